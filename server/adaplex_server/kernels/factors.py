"""Factors on a linear's inputs and outputs, each token's own: DoRA's and IA3's (`model.factors` says where they lie).

    x[t, k] := x[t, k] * (a[r, 0, k] + a[r + 1, 0, k])
    y[t, n] := (y[t, n] - bias[n]) * (b[r, n] + b[r + 1, n]) + bias[n] * (b[r + 2, n] + b[r + 3, n])

in float32, where r is the token's row; a token without one is not touched. Elementwise, so nobody's numbers depend on
others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FactorPlan:
    """index: [T] int32, the first pool row of each token's factors, -1 for none. spans: the same on the host, (begin,
    end, row) of the tokens that have some; empty where only the device knows.
    """

    index: torch.Tensor
    spans: tuple[tuple[int, int, int], ...]


def scale_inputs(x: torch.Tensor, a: torch.Tensor, plan: FactorPlan) -> torch.Tensor:
    """x [T, K] with its factors, in memory of its own. a: [pool rows, G, K]."""
    if x.is_cuda:
        from adaplex_server.kernels.gpu import factors as gpu

        return gpu.scale_inputs(x, a, plan.index)
    scaled = x.clone()
    for begin, end, row in plan.spans:
        scaled[begin:end] = (x[begin:end].float() * (a[row, 0].float() + a[row + 1, 0].float())).to(x.dtype)
    return scaled


def scale_outputs(y: torch.Tensor, b: torch.Tensor, plan: FactorPlan, bias: torch.Tensor | None) -> None:
    """y [T, N], bias included, with its factors, in place. b: [pool rows, N]; bias: [N]."""
    if y.is_cuda:
        from adaplex_server.kernels.gpu import factors as gpu

        gpu.scale_outputs(y, b, plan.index, bias)
        return
    for begin, end, row in plan.spans:
        own = y[begin:end].float()
        factor = b[row].float() + b[row + 1].float()
        if bias is None:
            y[begin:end] = (own * factor).to(y.dtype)
        else:
            kept = bias.float() * (b[row + 2].float() + b[row + 3].float())
            y[begin:end] = ((own - bias.float()) * factor + kept).to(y.dtype)
