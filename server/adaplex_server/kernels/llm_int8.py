"""LLM.int8: weights and activations in eight bits, and outliers among the activations in their own type.

    y[t, n] = (sum over inliers of a[t, k] w[n, k]) * amax[t] * wmax[n] / 127^2  +  sum over outliers of x[t, k] W[n, k]
    w[n, k] = round(127 W / wmax[n]),  a[t, k] = round(127 x[t, k] / amax[t]),  W[n, k] = w[n, k] * wmax[n] / 127

An outlier is a value of magnitude `threshold` or more; amax[t] is the largest of the row's other magnitudes. Source:
Dettmers et al., "LLM.int8()" (arXiv 2208.07339), as bitsandbytes 0.50 computes it: the weight and x are rounded to
float16 before they are quantized, integer sums are exact, and the outliers' weight is rounded to x's dtype.

One thing differs on purpose. bitsandbytes takes a column out of the integer product for all rows of a batch when any
row has an outlier in it, so that a row's result depends on its neighbours. Here a row's outliers are its own: what is
computed for it is what bitsandbytes computes for that row alone.

Notation: M rows of x, N out-features, K in-features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from adaplex_server.kernels import dense

THRESHOLD = 6.0
# bitsandbytes' constants, to their last digit.
_PRODUCT = 6.200124e-05
_WEIGHT = 7.874015718698502e-3


@dataclass(frozen=True)
class LlmInt8Weight:
    """One weight [N, K]. Read-only. codes: [N, K] int8. absmax: [N] float32 (what bitsandbytes calls SCB). threshold:
    of outliers; 0 for none.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    threshold: float = THRESHOLD

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.codes.nbytes + self.absmax.nbytes


def quantize(weight: torch.Tensor, threshold: float = THRESHOLD) -> LlmInt8Weight:
    """weight: [N, K] floating point, on any device."""
    codes, absmax = quantize_rows(weight.half())
    return LlmInt8Weight(codes, absmax, threshold)


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values: [rows, K] float16. Returns codes [rows, K] int8 and absmax [rows] float32; a row of zeros stays one."""
    absmax = values.abs().amax(1).float()
    factor = (127.0 / absmax).masked_fill_(absmax == 0, 0.0)
    return torch.round(values * factor[:, None]).to(torch.int8), absmax


def fuse(weights: Sequence[LlmInt8Weight]) -> LlmInt8Weight:
    """Weights of one K and threshold, stacked along out-features."""
    if len(weights) == 1:
        return weights[0]
    return replace(
        weights[0], codes=torch.cat([w.codes for w in weights]), absmax=torch.cat([w.absmax for w in weights])
    )


def dequantize(weight: LlmInt8Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """W [N, K]: the product in float32, then rounded."""
    return (weight.codes * weight.absmax[:, None]).mul_(_WEIGHT).to(dtype)


def linear(x: torch.Tensor, weight: LlmInt8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [M, K]. Returns [M, N] in x's dtype. A row of the result depends on its row of x alone."""
    half = x.half()
    outliers = half.abs() >= weight.threshold if weight.threshold > 0 else None
    codes, absmax = quantize_rows(half if outliers is None else half.masked_fill(outliers, 0))
    if x.is_cuda:
        from adaplex_server.kernels.gpu.linear8 import llm_int8

        return llm_int8(x, codes, absmax, weight.codes, weight.absmax, weight.threshold, bias)
    # The integer products are exact, so that the number of rows cannot show.
    wide = torch._int_mm(codes, weight.codes.t()).float().mul_(absmax[:, None] * weight.absmax).mul_(_PRODUCT)
    y = (wide if bias is None else wide.add_(bias)).to(x.dtype)
    if outliers is not None:
        _add_outliers(y, x, outliers, weight)
    return y


def _add_outliers(y: torch.Tensor, x: torch.Tensor, outliers: torch.Tensor, weight: LlmInt8Weight) -> None:
    """In place, rows with the same columns together (models have theirs in few columns)."""
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row in outliers.any(1).nonzero().view(-1).tolist():
        rows_of.setdefault(tuple(outliers[row].nonzero().view(-1).tolist()), []).append(row)
    for columns, rows in rows_of.items():
        taken = replace(weight, codes=weight.codes[:, columns])
        own = x[rows][:, columns]
        y[rows] += dense.linear(own, dequantize(taken, x.dtype))


def reference(x: torch.Tensor, weight: LlmInt8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same in float32 as the formula says it, not rounded in between; on any device."""
    half = x.half()
    outliers = half.abs() >= (weight.threshold or torch.inf)
    inliers = half.masked_fill(outliers, 0)
    codes, absmax = quantize_rows(inliers)
    whole = (codes.double() @ weight.codes.double().t()) * (absmax[:, None] * weight.absmax) * _PRODUCT
    outer = x.float().masked_fill(~outliers, 0).double() @ dequantize(weight).double().t()
    total = whole + outer if bias is None else whole + outer + bias
    return total.to(x.dtype)
