"""Weights of eight bits with an affine code: absmax and zero-point quantization of rows, and 8-bit GPTQ's groups.

    weight[n, order[k]] = (code[n, k] - zero[n, k // group]) * scale[n, k // group]

Absmax: scale = max |row| / 127, zero = 0. Zero-point: the row's range, zero included, is mapped to -128..127 (Jacob et
al. 2017, arXiv 1712.05877). Only the weight is quantized; activations stay as they are. `order` is as in
`kernels.gptq`. This module owns the layout and the plain-torch reference, which also serves on CPUs.

Notation: N out-features, K in-features, G = ceil(K / group) groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from adaplex_server.kernels import dense
from adaplex_server.kernels.gptq import same_order

_ROWS = 2048


@dataclass(frozen=True)
class Int8Weight:
    """One weight [N, K]. Read-only.

    codes: [N, K] int8, sorted by group. scales: [N, G] float16 or float32. zeros: [N, G] int16 (an 8-bit zero may be
    one beyond the codes), None where all are zero. order: [K] int64, the in-feature that each code is for; None where
    codes are in the checkpoint's order.
    """

    group: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def suits_cpu_kernel(self) -> bool:
        """One scale a row and nothing else, in a shape that torch's kernel does not read beyond."""
        plain = self.scales.shape[1] == 1 and self.zeros is None and self.order is None
        return plain and self.in_features % 64 == 0 and self.out_features % 16 == 0

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros, self.order) if t is not None)


def quantize_absmax(weight: torch.Tensor) -> Int8Weight:
    """weight: [N, K] floating point, of any strides, on any device. A row of zeros stays one."""
    wide = weight.float().contiguous()
    scales = _quotient(wide.abs().amax(1, keepdim=True), 127)
    codes = (wide / scales.clamp(min=1e-38)).round_().clamp_(-127, 127).to(torch.int8)
    return Int8Weight(weight.shape[1], codes, scales, None)


def quantize_zeropoint(weight: torch.Tensor) -> Int8Weight:
    """weight: [N, K] floating point, of any strides, on any device."""
    wide = weight.float().contiguous()
    low, high = wide.amin(1, keepdim=True).clamp_(max=0), wide.amax(1, keepdim=True).clamp_(min=0)
    scales = _quotient(high - low, 255).clamp_(min=1e-38)
    zeros = (-128 - low / scales).round_()
    codes = (wide / scales).add_(zeros).round_().clamp_(-128, 127).to(torch.int8)
    return Int8Weight(weight.shape[1], codes, scales, zeros.to(torch.int16))


def _quotient(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """Rounded once: on a GPU a number as divisor becomes its reciprocal, which is another number than on a CPU."""
    return values / torch.full_like(values, divisor)


def fuse(weights: Sequence[Int8Weight]) -> Int8Weight | None:
    """The weights stacked along out-features, or None where their groups differ."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if any(w.group != first.group or not same_order(w.order, first.order) for w in weights):
        return None
    zeros: torch.Tensor | None = None
    if any(w.zeros is not None for w in weights):
        zeros = torch.cat(
            [torch.zeros_like(w.scales, dtype=torch.int16) if w.zeros is None else w.zeros for w in weights]
        )
    return replace(
        first,
        codes=torch.cat([w.codes for w in weights]),
        scales=torch.cat([w.scales for w in weights]),
        zeros=zeros,
    )


def dequantize(weight: Int8Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[N, K] in the checkpoint's order of in-features: the product in float32, then rounded."""
    out = torch.empty(weight.codes.shape, dtype=dtype, device=weight.codes.device)
    for begin in range(0, weight.out_features, _ROWS):
        rows = slice(begin, begin + _ROWS)
        values = weight.codes[rows].float()
        if weight.zeros is not None:
            values.sub_(_by_column(weight.zeros[rows], weight))
        out[rows] = values.mul_(_by_column(weight.scales[rows], weight))
    if weight.order is None:
        return out
    return torch.empty_like(out).index_copy_(1, weight.order, out)


def _by_column(values: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """[rows, G] to something that [rows, K] can be multiplied with."""
    if values.shape[1] == 1:
        return values.float()
    return values.float().repeat_interleave(weight.group, dim=1)[:, : weight.in_features]


def linear(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [M, K] in the checkpoint's order. Returns [M, N] in x's dtype: the weight is rounded to x's dtype.

    Without an expanded copy of the weight on CUDA for 16-bit types (`kernels.gpu.linear8`), and on CPUs for bfloat16
    where rows have one scale and no zero (torch's own kernel, whose rows depend on nothing else).
    """
    if x.is_cuda and x.dtype != torch.float32:
        from adaplex_server.kernels.gpu.linear8 import linear8

        ordered = x if weight.order is None else x.index_select(1, weight.order)
        return linear8(ordered, weight.codes, weight.scales, weight.zeros, weight.group, bias)
    if x.dtype == torch.bfloat16 and not x.is_cuda and weight.suits_cpu_kernel:
        # Its scales would be rounded to bfloat16, too: ones are not.
        sums = torch._weight_int8pack_mm(x.contiguous(), weight.codes, x.new_ones(weight.out_features))
        y = sums.float().mul_(weight.scales.view(-1))
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    return dense.linear(x, dequantize(weight, x.dtype), bias)
