"""A reference GPTQ quantizer: makes AutoGPTQ's tensors of a dense weight from the second moments of its inputs.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv
2210.17323). In-features are rounded one after another; what the rounding of one does to the outputs is made good by
those that are still to come. For large models, gptqmodel is the tool: this is for small ones, and for checking the
reader without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_BLOCK = 128
_TOP = 15


@dataclass(frozen=True)
class GptqRecipe:
    """group: in-features that share a scale, -1 for all. symmetric: the zero is 8. act_order: in-features with the
    largest inputs first.

    damping: part of the moments' mean that is added to their diagonal.
    """

    group: int = 128
    symmetric: bool = True
    act_order: bool = False
    damping: float = 0.01

    def config(self) -> dict[str, object]:
        """config.json's quantization_config of a checkpoint made so."""
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": self.group,
            "sym": self.symmetric,
            "desc_act": self.act_order,
            "damp_percent": self.damping,
            "checkpoint_format": "gptq",
        }


@torch.no_grad()
def quantize(weight: torch.Tensor, moments: torch.Tensor, recipe: GptqRecipe) -> dict[str, torch.Tensor]:
    """weight: [N, K] float, N and K multiples of 8. moments: [K, K], the sum of x x^T over calibration inputs x.

    Returns "qweight" [K / 8, N] and "qzeros" [G, N / 8] int32 (zeros minus one), "scales" [G, N] float16, "g_idx"
    [K] int32.
    """
    rows, columns = weight.shape
    group = columns if recipe.group == -1 else recipe.group
    moments = moments.float().clone()
    unused = moments.diagonal() == 0
    moments.diagonal()[unused] = 1
    order = moments.diagonal().argsort(descending=True) if recipe.act_order else torch.arange(columns)
    # [K, N]: an in-feature's weights lie together, as they are worked on together.
    rest = weight.float().t().masked_fill(unused[:, None], 0)[order]
    factor = _inverse_factor(moments[order][:, order], recipe.damping)
    codes = torch.empty(columns, rows)
    scales: list[torch.Tensor] = []
    zeros: list[torch.Tensor] = []
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        errors = torch.empty(end - begin, rows)
        for k in range(begin, end):
            if k % group == 0:
                # In-features behind this block do not hold its errors yet: the grid is made of what there is.
                scale, zero = _grid(rest[k : k + group], recipe.symmetric)
                scales.append(scale)
                zeros.append(zero)
            codes[k] = (rest[k] / scale).add_(zero).round_().clamp_(0, _TOP)
            error = errors[k - begin]
            torch.sub(rest[k], (codes[k] - zero).mul_(scale), out=error).div_(factor[k, k])
            rest[k + 1 : end].addr_(factor[k, k + 1 : end], error, alpha=-1)
        rest[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    in_order = torch.arange(columns)
    g_idx, by_feature = torch.empty_like(in_order), torch.empty_like(codes)
    g_idx[order], by_feature[order] = in_order // group, codes
    return {
        "qweight": _pack(by_feature.to(torch.int64), 0),
        "qzeros": _pack(torch.stack(zeros).to(torch.int64) - 1, 1),
        "scales": torch.stack(scales).half(),
        "g_idx": g_idx.to(torch.int32),
    }


def _inverse_factor(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped moments."""
    moments.diagonal().add_(damping * moments.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)


def _grid(values: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (as float16 will keep it) and zero [N] of values [g, N]."""
    low, high = values.amin(dim=0).clamp(max=0), values.amax(dim=0).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / _TOP).clamp(min=1e-6).half().float()
    if symmetric:
        return scale, torch.full_like(scale, 8)
    # A zero of 0 would be stored as -1.
    return scale, (-low / scale).round().clamp(1, _TOP)


def _pack(codes: torch.Tensor, dim: int) -> torch.Tensor:
    """Eight values below 16 of neighbours along `dim` into an int32, the first in the lowest bits."""
    parts = codes.unflatten(dim, (-1, 8)).unbind(dim + 1)
    words = sum(part << (4 * index) for index, part in enumerate(parts))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()
