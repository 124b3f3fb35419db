"""First weights of a LoRA that are taken from the base. Neither changes the base: it is shared, and stays as served.

PiSSA (Meng et al. 2024, arXiv 2404.02948) begins at the r largest singular values of each weight and takes them out
of the base. Here the base keeps them, and a second, frozen LoRA takes them away: y = W x + s B A x - s B0 A0 x, saved
as one LoRA of rank 2 r.

LoftQ (Li et al. 2023, arXiv 2310.08659), its first iteration: B A is the best rank-r approximation of what quantizing
lost, W - Q(W).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.methods.peft_adapter import INITIAL, TRAINED

_ITERATIONS = 16
_SPARE_COLUMNS = 8


@torch.no_grad()
def begin_with_singular_values(model: Any) -> None:
    """PiSSA: set the trained LoRA, and add the frozen one that makes their sum zero. model: PEFT's LoRA model."""
    model.add_adapter(INITIAL, model.peft_config[TRAINED])
    for layer in _lora_layers(model):
        a, b = _low_rank(_weight(layer), layer.r[TRAINED], layer.scaling[TRAINED])
        for name, sign in ((TRAINED, 1), (INITIAL, -1)):
            layer.lora_A[name].weight.copy_(a)
            layer.lora_B[name].weight.copy_(sign * b)
    model.base_model.set_adapter([TRAINED, INITIAL])
    for name, parameter in model.named_parameters():
        if f".{INITIAL}." in name:
            parameter.requires_grad_(False)


@torch.no_grad()
def begin_with_lost_precision(model: Any, folder: Path | None, form: str) -> None:
    """LoftQ: set the LoRA to what quantizing the dense base of `folder` lost. Raises InvalidRequest where the dense
    weights are not there.
    """
    if form not in ("nf4", "fp4", "int8") or folder is None or "quantization_config" in _config(folder):
        raise InvalidRequest(
            "init=loftq needs a dense base that is quantized here (quantize nf4, fp4 or int8): this base comes "
            f"quantized ({form}), and what that lost is not known; use init=pissa or default",
            param="init",
        )
    dense = dict(_tensors(folder))
    for path, layer in _named_lora_layers(model):
        name = path.removeprefix("base_model.model.") + ".weight"
        lost = dense[name].to(layer.lora_A[TRAINED].weight.device).float() - _weight(layer)
        a, b = _low_rank(lost, layer.r[TRAINED], layer.scaling[TRAINED])
        layer.lora_A[TRAINED].weight.copy_(a)
        layer.lora_B[TRAINED].weight.copy_(b)


def _low_rank(weight: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank] such that scaling * B A is close to the best approximation of weight [out, in]."""
    columns = min(rank + _SPARE_COLUMNS, *weight.shape)
    u, s, v = torch.svd_lowrank(weight, q=columns, niter=_ITERATIONS)
    root = (s[:rank] / scaling).sqrt()
    a, b = torch.zeros(rank, weight.shape[1]), torch.zeros(weight.shape[0], rank)
    a, b = a.to(weight.device), b.to(weight.device)
    a[: len(root)], b[:, : len(root)] = (v[:, :rank] * root).t(), u[:, :rank] * root
    return a, b


def _weight(layer: Any) -> torch.Tensor:
    from peft.utils.integrations import dequantize_module_weight

    found: torch.Tensor = dequantize_module_weight(layer.get_base_layer()).float()
    return found


def _named_lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((path, layer) for path, layer in model.named_modules() if isinstance(layer, LoraLayer))


def _lora_layers(model: Any) -> Iterator[Any]:
    return (layer for _, layer in _named_lora_layers(model))


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                yield key, file.get_tensor(key)
