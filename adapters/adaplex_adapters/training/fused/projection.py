"""Frozen linears with LoRAs as one step of the gradient: each weight is expanded once forward and once backward,
linears of one input share what is kept of it, and no product is kept.

    y = x W^T + bias + s (x A^T) B^T

With g = s dy B:  dx = dy W + g A,  dA = g^T x,  dB = s dy^T (x A^T). Products are made in x's dtype, as autocast does.
s is taken into B beforehand (`halves`), so that B stands for s B below. Several LoRAs on one linear, each for its share
of the rows, are batched products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from adaplex_adapters.training.fused.adapted import Adapted
from adaplex_adapters.training.fused.halves import Pair
from adaplex_adapters.training.fused.pointwise import gated, gated_gradient


def project(x: torch.Tensor, parts: Sequence[Adapted], pairs: Sequence[Pair]) -> tuple[torch.Tensor, ...]:
    """x: [rows, L, in] -> [rows, L, out] of each. pairs: the LoRA of each, in x's dtype."""
    found: tuple[torch.Tensor, ...] = _Projections.apply(x, tuple(parts), *_weights(pairs))
    return found


def gated_down(gate: torch.Tensor, up: torch.Tensor, part: Adapted, pair: Pair, recomputed: bool) -> torch.Tensor:
    """The linear of silu(gate) * up, of which only gate and up are kept. recomputed: only what the gradient needs is
    wanted; the result has no values.
    """
    found: torch.Tensor = _GatedDown.apply(gate, up, part, recomputed, *_weights([pair]))
    return found


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor, parts: tuple[Adapted, ...], *weights: Any) -> tuple[torch.Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        found, inner = [], []
        for part, pair in zip(parts, _pairs(weights), strict=True):
            y, h = _forward(flat, part, pair)
            found.append(y.view(*x.shape[:-1], -1))
            inner.append(h)
        context.parts = parts
        context.save_for_backward(x, *inner, *weights)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        parts, count = context.parts, len(context.parts)
        x, *saved = context.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        to_x: torch.Tensor | None = None
        to_weights: list[torch.Tensor | None] = []
        for part, gradient, h, pair in zip(parts, gradients, saved[:count], _pairs(saved[count:]), strict=True):
            slope = gradient.reshape(-1, gradient.shape[-1])
            shares, inner = _lora_gradient(flat, slope, h, pair)
            to_weights += shares
            if context.needs_input_grad[0]:
                to_x = _input_gradient(slope, inner, part, pair, to_x)
        return (None if to_x is None else to_x.view_as(x), None, *to_weights)


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, gate: torch.Tensor, up: torch.Tensor, part: Adapted, recomputed: bool, *weights: Any
    ) -> torch.Tensor:
        active = gated(gate, up).view(-1, gate.shape[-1])
        (pair,) = _pairs(weights)
        if recomputed:
            h = None if pair is None else _shrink(active, pair)
            y = active.new_empty(len(active), part.linear.out_features)
        else:
            y, h = _forward(active, part, pair)
        context.part = part
        context.save_for_backward(gate, up, h, *weights)
        return y.view(*gate.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        gate, up, h, *weights = context.saved_tensors
        part, (pair,) = context.part, _pairs(weights)
        slope = gradients[0].reshape(-1, gradients[0].shape[-1])
        inner = None if pair is None else _inner_gradient(slope, pair)
        to_active = _input_gradient(slope, inner, part, pair, None).view_as(gate)
        to_gate, to_up, active = gated_gradient(gate, up, to_active)
        shares, _ = _lora_gradient(active.view(-1, gate.shape[-1]), slope, h, pair, inner)
        return (to_gate, to_up, None, None, *shares)


def _forward(x: torch.Tensor, part: Adapted, pair: Pair) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x: [T, in] -> (y [T, out], x A^T or None)."""
    y = torch.nn.functional.linear(x, part.weight(x.dtype), _bias(part, x.dtype))
    if pair is None:
        return y, None
    h, (_, b) = _shrink(x, pair), pair
    if b.dim() == 2:
        y.addmm_(h, b.t())
    else:
        _grouped(y, len(b)).baddbmm_(h, b.transpose(1, 2))
    return y, h


def _shrink(x: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    a = pair[0]
    return torch.mm(x, a.t()) if a.dim() == 2 else torch.bmm(_grouped(x, len(a)), a.transpose(1, 2))


def _inner_gradient(slope: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """g: [T, rank] or [groups, T / groups, rank]."""
    b = pair[1]
    return torch.mm(slope, b) if b.dim() == 2 else torch.bmm(_grouped(slope, len(b)), b)


def _lora_gradient(
    x: torch.Tensor, slope: torch.Tensor, h: torch.Tensor | None, pair: Pair, inner: torch.Tensor | None = None
) -> tuple[tuple[torch.Tensor | None, torch.Tensor | None], torch.Tensor | None]:
    """((dA, dB), g)."""
    if pair is None or h is None:
        return (None, None), None
    g = _inner_gradient(slope, pair) if inner is None else inner
    if g.dim() == 2:
        return (torch.mm(g.t(), x), torch.mm(slope.t(), h)), g
    rows, slopes = _grouped(x, len(g)), _grouped(slope, len(g))
    return (torch.bmm(g.transpose(1, 2), rows), torch.bmm(slopes.transpose(1, 2), h)), g


def _input_gradient(
    slope: torch.Tensor, inner: torch.Tensor | None, part: Adapted, pair: Pair, so_far: torch.Tensor | None
) -> torch.Tensor:
    """dx [T, in], added to what is there `so_far`."""
    weight = part.weight(slope.dtype)
    found = torch.mm(slope, weight) if so_far is None else so_far.addmm_(slope, weight)
    if pair is not None and inner is not None:
        a = pair[0]
        if a.dim() == 2:
            found.addmm_(inner, a)
        else:
            _grouped(found, len(a)).baddbmm_(inner, a)
    return found


def _grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.view(groups, -1, x.shape[-1])


def _bias(part: Adapted, dtype: torch.dtype) -> torch.Tensor | None:
    return None if part.linear.bias is None else part.linear.bias.to(dtype)


def _weights(pairs: Sequence[Pair]) -> list[torch.Tensor | None]:
    """A and B of each in turn."""
    return [weight for pair in pairs for weight in (pair or (None, None))]


def _pairs(weights: Sequence[Any]) -> list[Pair]:
    return [None if a is None else (a, b) for a, b in zip(weights[::2], weights[1::2], strict=True)]
