"""What a base costs on a GPU, worked out from its config.json: bits a parameter, weights, keys and values, adapters,
and on which devices it fits. Weights are not read, and need not be there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from adaplex_adapters.errors import StartupError
from adaplex_server.bases.format_bits import FormatBits, format_bits
from adaplex_server.model.adapter_pool import RANK_PAGE, bytes_per_page
from adaplex_server.model.config import ModelConfig, read_config
from adaplex_server.model.families import FAMILIES, linear_targets
from adaplex_server.model.formats.choice import choose_format
from adaplex_server.model.formats.quantization import Quantization
from adaplex_server.model.kv_cache import KvCache

GIB = 1 << 30
MEMORIES = tuple(size * GIB for size in (8, 12, 16, 24, 32, 40, 48, 80, 96, 141))
"""Memory of common GPUs, in bytes."""
LEAST_TOKENS = 2048
ADAPTER_RANK = 16


@dataclass(frozen=True)
class Fit:
    """A device of `memory` bytes. left: what weights and steps leave, negative where they do not fit. tokens: of keys
    and values that the rest holds, or holds beside `adapters` adapters of rank 16.
    """

    memory: int
    left: int
    fits: bool
    tokens: int
    adapters: int
    tokens_beside_adapters: int


@dataclass(frozen=True)
class BaseDescription:
    """name, family: of the base. parameters: all; linear_parameters: those of the linears of its layers, which formats
    are about; the others stay in the dtype of the activations. format: what it is kept in. weights: bytes on a GPU.
    checkpoint: bytes of the weight files, 0 where there are none. kv_token: bytes of a token's keys and values.
    adapter_rank: bytes of one rank of an adapter on all linears. step: bytes of activations and of the runtime. fits:
    by device.
    """

    name: str
    family: str
    layers: int
    hidden_size: int
    max_context: int
    parameters: int
    linear_parameters: int
    format: FormatBits
    dtype: str
    weights: int
    checkpoint: int
    kv_token: int
    adapter_rank: int
    step: int
    fits: tuple[Fit, ...]


def read_description_config(path: Path) -> tuple[Path, ModelConfig]:
    """The folder and config of a base, given its folder or its config.json. Raises StartupError."""
    folder = path.parent if path.is_file() and path.name == "config.json" else path
    if not folder.is_dir():
        raise StartupError(f"{path} is neither a folder in Hugging Face layout nor a config.json")
    return folder, read_config(folder)


def describe_base(
    folder: Path,
    config: ModelConfig,
    quantization: Quantization,
    dtype: torch.dtype,
    step: int,
    memories: tuple[int, ...] = MEMORIES,
    adapters: int = 64,
) -> BaseDescription:
    """step: bytes that a server needs beside weights, keys, values and adapters. memories: of devices, in bytes.
    adapters: how many of rank 16 should fit, too. Raises StartupError where the format is not supported.
    """
    name, _ = choose_format(folder, config, quantization)
    bits = format_bits(name, config, quantization, dtype.itemsize * 8)
    linear = sum(t.in_features * t.out_features for t in linear_targets(config).values()) * config.num_layers
    rest = _parameters_beside_linears(config)
    weights = int(linear * bits.device / 8) + rest * dtype.itemsize
    kv_token = KvCache.bytes_per_page(config.num_layers, 1, config.num_kv_heads, config.head_dim, dtype)
    rank = bytes_per_page(config, dtype) // RANK_PAGE
    fits = tuple(_fit(memory, memory - weights - step, kv_token, rank, adapters) for memory in memories)
    return BaseDescription(
        name=config.name,
        family=FAMILIES[config.family].model_type,
        layers=config.num_layers,
        hidden_size=config.hidden_size,
        max_context=config.max_context,
        parameters=linear + rest,
        linear_parameters=linear,
        format=bits,
        dtype=str(dtype).removeprefix("torch."),
        weights=weights,
        checkpoint=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        kv_token=kv_token,
        adapter_rank=rank,
        step=step,
        fits=fits,
    )


def _fit(memory: int, left: int, kv_token: int, rank: int, adapters: int) -> Fit:
    beside = left - adapters * ADAPTER_RANK * rank
    tokens = max(0, left // kv_token)
    return Fit(memory, left, tokens >= LEAST_TOKENS, tokens, adapters, max(0, beside // kv_token))


def _parameters_beside_linears(config: ModelConfig) -> int:
    """Embedding, head, positions, norms and biases."""
    family, hidden = FAMILIES[config.family], config.hidden_size
    per_norm = 2 if family.norm == "layer" else 1
    widths = [config.head_dim if norm in ("q", "k") else hidden for norm in family.norms]
    biases = sum(linear_targets(config)[linear].out_features for linear in config.biased_linears)
    total = config.vocab_size * hidden * (1 if config.tied_head else 2)
    total += config.num_layers * (per_norm * sum(widths) + biases) + per_norm * hidden
    if family.positions is not None:
        total += (config.max_context + family.position_offset) * hidden
    if family.embedding_norm is not None:
        total += per_norm * hidden
    return total + (config.vocab_size if family.head_bias else 0)
