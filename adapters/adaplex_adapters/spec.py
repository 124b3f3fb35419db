"""What a read and validated adapter is, in memory. These types own nothing and are never changed.

Notation: `in` and `out` are the features of the adapted linear, `r` the rank of that module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

KIND_LORA = "lora"


@dataclass(frozen=True)
class AdapterSpec:
    """What one tells about an adapter without its tensors.

    revision: SHA-256 (hex) over the normalized content; the adapter's only identity.
    rank: the largest rank of any module. targets: last parts of the adapted module paths, sorted ("k_proj", ...).
    parameters: number of trained scalars. nbytes: their size as stored.
    base_model: `base_model_name_or_path` as the config states it (information only).
    """

    revision: str
    kind: str
    rank: int
    targets: tuple[str, ...]
    parameters: int
    nbytes: int
    base_model: str


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear: y += scaling * B (A x). a: [r, in], b: [out, r], both float32/bfloat16/float16 on the CPU.

    scaling is alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023), with the patterns already applied.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class LoraAdapter:
    """A whole LoRA adapter. modules: base module path ("model.layers.0.self_attn.q_proj") -> LoraModule."""

    spec: AdapterSpec
    modules: Mapping[str, LoraModule]
