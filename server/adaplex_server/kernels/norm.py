"""Root-mean-square norm (Zhang and Sennrich 2019) and layer norm (Ba et al. 2016), with the residual addition before
it.

    total = x + delta                                                     in x's dtype
    rms:    total / sqrt(mean(total^2) + eps) * weight                    sums in float32
    layer:  (total - mean) / sqrt(variance + eps) * weight + bias
"""

from __future__ import annotations

import torch


def add_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    center: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, delta: [T, H]; weight, bias: [H]; all of one dtype. Returns (x + delta, its norm); x may be overwritten.

    center: layer norm.
    """
    if x.is_cuda:
        from adaplex_server.kernels.gpu import norm as gpu

        return gpu.add_norm(x, delta, weight, bias, eps, center)
    total = x if delta is None else x.add_(delta)
    if center:
        return total, torch.layer_norm(total, weight.shape, weight, bias, eps)
    return total, rms_norm(total, weight, eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [..., H], weight: [H], of one dtype. On the CPU."""
    # Written for few operations: the sum of squares is taken in float32 without a float32 copy of x.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, inverse, out=torch.empty_like(x)).mul_(weight)


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, center: bool
) -> torch.Tensor:
    """The norm of x as the formulas say it; on any device."""
    wide = x.float()
    if center:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (wide if bias is None else wide + bias.float()).to(x.dtype)
