"""How large the files of an adapter may be. Each limit is checked before memory is taken for what it limits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReadLimits:
    """Limits of reading one adapter folder. Sizes are in bytes.

    max_rank: rank of any module. max_virtual_tokens: of a soft prompt or prefix. max_bottleneck: width of any
    bottleneck. max_config_bytes: adapter_config.json. max_header_bytes: the JSON header of the safetensors file.
    max_file_bytes: the whole safetensors file. max_tensors: tensors in it. max_files: entries in the folder.
    """

    max_rank: int = 256
    max_virtual_tokens: int = 4096
    max_bottleneck: int = 4096
    max_config_bytes: int = 1 << 20
    max_header_bytes: int = 8 << 20
    max_file_bytes: int = 4 << 30
    max_tensors: int = 20_000
    max_files: int = 1_000
