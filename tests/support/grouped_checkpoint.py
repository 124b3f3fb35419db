"""Checkpoints of random codes in GPTQ's or AWQ's layout, made of a dense checkpoint of Llama's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def _words(codes: torch.Tensor, bits: int, places: tuple[int, ...] | None = None) -> torch.Tensor:
    """[.., n] codes as int32 words along the last dimension; places: which neighbour each of a word's fields holds."""
    per_word = 32 // bits
    fields = codes.to(torch.int64).unflatten(-1, (-1, per_word))[..., places or tuple(range(per_word))]
    words = (fields << (bits * torch.arange(per_word))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def write_grouped(folder: Path, dense: Path, quantization: dict[str, Any], bits: int) -> dict[str, torch.Tensor]:
    """A checkpoint of random codes in GPTQ's or AWQ's layout, and the weights that they stand for."""
    awq, version = quantization["quant_method"] == "awq", quantization.get("checkpoint_format", "gptq")
    random, group = torch.Generator().manual_seed(bits), quantization["group_size"]
    tensors, meant = load_file(dense / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        path = name.removesuffix(".weight")
        n, k = tensors.pop(name).shape
        codes = torch.randint(0, 1 << bits, (n, k), generator=random)
        zeros = torch.randint(1, 1 << bits, (n, k // group), generator=random)
        scales = torch.rand(k // group, n, generator=random).mul_(0.01).add_(0.001).half()
        if awq:
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            tensors[f"{path}.qweight"], tensors[f"{path}.qzeros"] = (_words(t.t(), 4, order) for t in (codes, zeros))
            g_idx = torch.arange(k) // group
        else:
            g_idx = (torch.arange(k) // group)[torch.randperm(k, generator=random)]
            tensors[f"{path}.qweight"] = _words(codes, bits).t().contiguous()
            tensors[f"{path}.qzeros"] = _words(zeros.t() - int(version == "gptq"), bits)
            tensors[f"{path}.g_idx"] = g_idx.to(torch.int32)
        tensors[f"{path}.scales"] = scales
        meant[path] = (codes - zeros[:, g_idx]) * scales.float().t()[:, g_idx]
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((dense / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return meant
