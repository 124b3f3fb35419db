"""Adding a LoRA adapter to the dequantized weights of its base and writing the sum as a checkpoint.

    W' = W + scaling * B A        in float32, rounded once to the dtype of the result

W holds the values that the quantized base multiplies with, so the result answers as base and adapter do together. It
is not quantized again: rounding the sum to 4 bits takes the adapter away (what PEFT's merge_and_unload does on such a
base).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaplex_adapters.errors import StartupError
from adaplex_adapters.merging.plan import MergeStep, plan_merge
from adaplex_adapters.merging.source import WeightSource
from adaplex_adapters.merging.writer import SHARD_BYTES, ShardWriter, whole_folder, write_json
from adaplex_adapters.spec import Adapter, LoraModule

Tell = Callable[[str, float], None]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What is taken over from the base's folder, where it has it: tokenizer, template and generation defaults; no code,
no weights.
"""


@dataclass(frozen=True)
class MergeReport:
    """merged: weights that got a LoRA; passed: tensors as the base has them; nbytes: of all tensors in the result."""

    out: Path
    merged: int
    passed: int
    nbytes: int


@torch.no_grad()
def merge_adapter(
    source: WeightSource,
    adapter: Adapter,
    base_folder: Path,
    out: Path,
    dtype: torch.dtype = torch.bfloat16,
    tell: Tell = lambda text, fraction: None,
    shard_bytes: int = SHARD_BYTES,
) -> MergeReport:
    """Write base + adapter to the folder `out`, which must not exist (or be empty).

    base_folder gives config.json, tokenizer and generation config. tell is told what is done and how far it is (0..1).
    Raises InvalidAdapter before anything is read or written if a module does not fit; Conflict; StorageFailed.
    """
    config = standalone_config(base_folder, dtype)
    steps = plan_merge(source.shapes(), adapter)
    with whole_folder(out) as staging:
        writer = ShardWriter(staging, shard_bytes)
        for index, step in enumerate(steps):
            tell(f"merging into {out.name}", index / len(steps))
            writer.add(step.name, apply_step(step, source.read(step.name), dtype))
        nbytes = writer.finish()
        write_json(staging / "config.json", config)
        for name in COPIED:
            if (base_folder / name).is_file():
                shutil.copyfile(base_folder / name, staging / name)
    tell(f"merged into {out.name}", 1.0)
    merged = sum(step.module is not None for step in steps)
    return MergeReport(out, merged, len(steps) - merged, nbytes)


def apply_step(step: MergeStep, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The result's tensor, in memory of its own; integers are passed on as they are."""
    if tuple(values.shape) != step.shape:
        raise StartupError(f"the base's {step.name} is {list(values.shape)}, though {list(step.shape)} was announced")
    if not values.is_floating_point():
        return values.clone()
    if step.module is None:
        return values.to(dtype, copy=True)
    return merged_weight(values, step.module).to(dtype)


def merged_weight(weight: torch.Tensor, module: LoraModule) -> torch.Tensor:
    """weight [out, in] + scaling * B A, in float32."""
    return torch.addmm(weight.float(), module.b.float(), module.a.float(), alpha=module.scaling)


def standalone_config(base_folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The base's config.json as a dense model states it. Raises StartupError when there is none."""
    try:
        config = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"{base_folder} has no readable config.json: {error}") from error
    if not isinstance(config, dict):
        raise StartupError(f"{base_folder}: config.json does not hold an object")
    for key in ("quantization_config", "torch_dtype", "_name_or_path"):
        config.pop(key, None)
    return {**config, "dtype": str(dtype).removeprefix("torch.")}
