"""What lies between the linears of a Llama-like layer, with gradients of its own: each is one launch on a GPU and keeps
no more than its gradient needs. On a CPU the same formulas in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class AddNorm(torch.autograd.Function):
    """(h, delta, weight [H], eps) -> (h + delta, its RMS norm times weight), rows of any shape [..., H]."""

    @staticmethod
    def forward(
        context: Any, h: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, normed, root = _norm(_flat(h), _flat(delta), weight, eps)
        context.save_for_backward(total, weight, root)
        return total.view_as(h), normed.view_as(h)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total, weight, root = context.saved_tensors
        found = _norm_gradient(_flat(gradients[1]), _flat(gradients[0]), total, weight, root).view_as(gradients[1])
        return found, found, None, None


class Norm(torch.autograd.Function):
    """(h, weight [H], eps) -> the RMS norm of h [..., H] times weight."""

    @staticmethod
    def forward(context: Any, h: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        total, normed, root = _norm(_flat(h), None, weight, eps)
        context.save_for_backward(total, weight, root)
        return normed.view_as(h)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total, weight, root = context.saved_tensors
        found = _norm_gradient(_flat(gradients[0]), None, total, weight, root)
        return found.view_as(gradients[0]), None, None


class Rotary(torch.autograd.Function):
    """(x [rows, L, heads, D], cos, sin [L, D]) -> x with rotary positions."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = context.saved_tensors
        return _rotated(gradients[0].contiguous(), cos, sin, -1.0), None, None


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, without a gradient."""
    if gate.is_cuda:
        from adaplex_adapters.training.fused import gpu_kernels

        return gpu_kernels.gated(gate, up)
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def gated_gradient(
    gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of gate, gradient of up, silu(gate) * up) from the gradient of the last, which may be overwritten."""
    if gate.is_cuda:
        from adaplex_adapters.training.fused import gpu_kernels

        return gpu_kernels.gated_gradient(gate, up, gradient)
    g, u, d = gate.float(), up.float(), gradient.float()
    share = torch.sigmoid(g)
    to_gate = d * u * share * (1 + g * (1 - share))
    return to_gate.to(gate.dtype), (d * g * share).to(up.dtype), (g * share * u).to(gate.dtype)


def _norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if x.is_cuda:
        from adaplex_adapters.training.fused import gpu_kernels

        return gpu_kernels.norm(x, delta, weight, eps)
    total = x if delta is None else x + delta
    root = (total.float().square().mean(dim=1) + eps).rsqrt()
    normed = (total.float() * root[:, None]).to(x.dtype)
    return total, (normed * weight).to(x.dtype), root


def _norm_gradient(
    gradient: torch.Tensor,
    beside: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor,
    root: torch.Tensor,
) -> torch.Tensor:
    if gradient.is_cuda:
        from adaplex_adapters.training.fused import gpu_kernels

        return gpu_kernels.norm_gradient(gradient, beside, total, weight, root)
    g, normed = gradient.float() * weight.float(), total.float() * root[:, None]
    found = root[:, None] * (g - normed * (g * normed).mean(dim=1, keepdim=True))
    return (found if beside is None else found + beside.float()).to(gradient.dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    if x.is_cuda:
        from adaplex_adapters.training.fused import gpu_kernels

        return gpu_kernels.rotated(x, cos, sin, sign)
    half = x.shape[-1] // 2
    low, high = x.float().split(half, dim=-1)
    c, s = cos.float()[:, None, :half], sign * sin.float()[:, None, :half]
    return torch.cat([low * c - high * s, high * c + low * s], dim=-1).to(x.dtype)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
