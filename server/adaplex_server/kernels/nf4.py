"""bitsandbytes' four bits a weight, NF4 and FP4, in blocks of 64 or more, each with its largest magnitude (absmax),
which double quantization keeps in eight bits.

    weight[n, k] = CODE[code[n, k]] * absmax[(n * K + k) // block]

NF4's sixteen values are quantiles of a normal distribution, FP4's are floating-point numbers of two exponent bits and
one of mantissa. Source: Dettmers et al., "QLoRA" (arXiv 2305.14314). Codes, absmax and dequantized values equal those
of bitsandbytes 0.50 bit for bit. Two codes share a byte, the earlier one in the upper half. This module owns the layout
that checkpoints have and the plain-torch reference; `kernels.nf4_cpu` multiplies on CPUs.

Notation: N out-features, K in-features, B = K / block blocks a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from adaplex_server.kernels import dense
from adaplex_server.kernels.blockwise8 import GROUP, dynamic_code, quantize_dynamic8

Kind = Literal["nf4", "fp4"]
BLOCK = 64
"""Values in a block unless told otherwise."""
_CHUNK = 1 << 22
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# By bit pattern: sign, two of exponent, one of mantissa.
_FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))


@cache
def code_values(kind: Kind, device: torch.device) -> torch.Tensor:
    """The 16 values of a code, float32 on `device`; callers never write to it."""
    return torch.tensor(_NF4 if kind == "nf4" else _FP4, dtype=torch.float32, device=device)


@cache
def _bounds(kind: Kind, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[15] float32, what separates the values in ascending order, and [16] uint8, the codes in that order."""
    values = code_values(kind, device)
    order = values.argsort()
    return (values[order[:-1]] + values[order[1:]]) / 2, order.to(torch.uint8)


@cache
def _pair_table(kind: Kind, device: torch.device) -> torch.Tensor:
    """[256] float64 that holds in its bits the two float32 values which a byte of codes stands for: one gather
    yields both.
    """
    code = code_values(kind, device)
    byte = torch.arange(256, device=device)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1).contiguous().view(torch.float64).view(-1)


@dataclass(frozen=True)
class NestedAbsmax:
    """Double-quantized absmax of a row-aligned weight, perhaps of several fused ones with their own groups and offsets.

        absmax[n, b] = table[codes[n, b]] * scales[(row_start[n] + b) // 256] + row_offset[n]

    codes: [N, B] uint8. table: [256] float32. scales: [groups] float32. row_start: [N] int32, the row's first block,
    where each fused weight begins at a multiple of 256. row_offset: [N] float32, the mean that was taken off.
    """

    codes: torch.Tensor
    table: torch.Tensor
    scales: torch.Tensor
    row_start: torch.Tensor
    row_offset: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """[N, B] float32."""
        blocks = torch.arange(self.codes.shape[1], dtype=torch.int32, device=self.codes.device)
        group = (self.row_start[:, None] + blocks).div_(GROUP, rounding_mode="floor")
        return self.table[self.codes.int()] * self.scales[group] + self.row_offset[:, None]

    def cpu(self) -> NestedAbsmax:
        """The same on the host."""
        parts = (self.codes, self.table, self.scales, self.row_start, self.row_offset)
        return NestedAbsmax(*(part.cpu() for part in parts))

    def nbytes(self) -> int:
        """Bytes of all but the table, which all weights share."""
        return self.codes.nbytes + self.scales.nbytes + self.row_start.nbytes + self.row_offset.nbytes


@dataclass(frozen=True)
class Nf4Weight:
    """One weight [N, K] in the order of a checkpoint. Read-only.

    codes: [ceil(N * K / 2)] uint8. absmax: [ceil(N * K / block)] float32, or NestedAbsmax where K % block == 0. kind:
    what the codes stand for. block: values that share an absmax.
    """

    out_features: int
    in_features: int
    codes: torch.Tensor
    absmax: torch.Tensor | NestedAbsmax
    kind: Kind = "nf4"
    block: int = BLOCK

    @property
    def row_aligned(self) -> bool:
        """No block reaches over the end of a row, so that rows can be cut, joined and read alone."""
        return self.in_features % self.block == 0

    def plain_absmax(self) -> torch.Tensor:
        """[ceil(N * K / block)] float32."""
        return self.absmax.dequantized().view(-1) if isinstance(self.absmax, NestedAbsmax) else self.absmax

    def nbytes(self) -> int:
        """Bytes of codes and absmax."""
        return self.codes.nbytes + (
            self.absmax.nbytes() if isinstance(self.absmax, NestedAbsmax) else self.absmax.nbytes
        )


def quantize_codes(weight: torch.Tensor, kind: Kind = "nf4", block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [ceil(n / 2)] uint8 and absmax [ceil(n / block)] float32 of a weight of n values (float32, bfloat16 or
    float16), in pieces of 4M values.
    """
    flat, device = weight.reshape(-1), weight.device
    bounds, order = _bounds(kind, device)
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-flat.numel() // block), dtype=torch.float32, device=device)
    for begin in range(0, flat.numel(), _CHUNK):
        piece = flat[begin : begin + _CHUNK].float()
        whole = piece.numel() - piece.numel() % block
        blocks = piece[:whole].view(-1, block)
        largest = blocks.abs().amax(dim=1)
        normal = blocks.mul(1.0 / largest.clamp(min=1e-38)[:, None]).view(-1)
        if whole < piece.numel():  # the short last block is divided, not multiplied: bitsandbytes' rounding
            last = piece[whole:].abs().max().clamp(min=1e-38)
            largest = torch.cat([largest, last[None]])
            normal = torch.cat([normal, piece[whole:] / last, piece.new_zeros(piece.numel() % 2)])
        nearest = order[torch.bucketize(normal.clamp_(-1, 1), bounds, out_int32=True)]
        codes[begin // 2 : (begin + _CHUNK) // 2] = nearest[::2].bitwise_left_shift(4).bitwise_or_(nearest[1::2])
        absmax[begin // block : begin // block + len(largest)] = largest
    return codes, absmax


def nest_absmax(absmax: torch.Tensor, rows: int) -> NestedAbsmax:
    """Double quantization of the absmax [rows * B] of one weight: the mean taken off, then groups of 256 in eight
    bits.
    """
    # On the CPU for every device: the order of the sum decides the last bit, and with it the base's values.
    offset = absmax.cpu().mean().to(absmax.device)
    codes, scales = quantize_dynamic8(absmax - offset)
    return nested(codes.view(rows, -1), dynamic_code(absmax.device), scales, offset)


def nested(codes: torch.Tensor, table: torch.Tensor, scales: torch.Tensor, offset: torch.Tensor) -> NestedAbsmax:
    """The NestedAbsmax of one weight: codes [N, B], and offset [] float32."""
    rows, blocks = codes.shape
    start = torch.arange(0, rows * blocks, blocks, dtype=torch.int32, device=codes.device)
    return NestedAbsmax(codes, table, scales, start, offset.to(torch.float32).expand(rows).contiguous())


def quantize(weight: torch.Tensor, *, double_quant: bool, kind: Kind = "nf4", block: int = BLOCK) -> Nf4Weight:
    """weight: [N, K] float32, bfloat16 or float16, on any device."""
    rows, columns = weight.shape
    codes, absmax = quantize_codes(weight, kind, block)
    if not double_quant:
        return Nf4Weight(rows, columns, codes, absmax, kind, block)
    if columns % block == 0:
        return Nf4Weight(rows, columns, codes, nest_absmax(absmax, rows), kind, block)
    # Blocks cross rows: rounded to eight bits as asked, but kept in float32, since such small or odd weights save
    # nothing.
    return Nf4Weight(rows, columns, codes, nest_absmax(absmax, 1).dequantized().view(-1), kind, block)


def fuse(weights: Sequence[Nf4Weight]) -> Nf4Weight:
    """The row-aligned weights of one K, kind and block stacked along out-features, exactly. Nested ones stay nested if
    all are, with the same table.
    """
    first = weights[0]
    assert all(w.row_aligned and fusable(w) == fusable(first) for w in weights)
    if len(weights) == 1:
        return first
    rows = sum(w.out_features for w in weights)
    codes = torch.cat([w.codes for w in weights])
    parts = [w.absmax for w in weights if isinstance(w.absmax, NestedAbsmax)]
    if len(parts) < len(weights) or any(not torch.equal(p.table, parts[0].table) for p in parts):
        plain = torch.cat([w.plain_absmax() for w in weights])
        return replace(first, out_features=rows, codes=codes, absmax=plain)
    starts: list[torch.Tensor] = []
    groups = 0
    for part in parts:
        starts.append(part.row_start + groups * GROUP)
        groups += len(part.scales)
    absmax = NestedAbsmax(
        torch.cat([p.codes for p in parts]),
        parts[0].table,
        torch.cat([p.scales for p in parts]),
        torch.cat(starts),
        torch.cat([p.row_offset for p in parts]),
    )
    return replace(first, out_features=rows, codes=codes, absmax=absmax)


def fusable(weight: Nf4Weight) -> tuple[int, Kind, int]:
    """What weights must share to be stacked."""
    return weight.in_features, weight.kind, weight.block


def unpack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Bytes [n] of two codes each to [2 n] codes, one a byte."""
    return torch.stack([codes >> 4, codes & 15], dim=1).view(-1)


def dequantize(weight: Nf4Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[N, K] in dtype: the product in float32, then rounded. In pieces, so that no more than the result is large."""
    size, device = weight.out_features * weight.in_features, weight.codes.device
    out = torch.empty(size + size % 2, dtype=dtype, device=device)
    table, absmax, block = _pair_table(weight.kind, device), weight.plain_absmax(), weight.block
    for begin in range(0, size, _CHUNK):
        indices = weight.codes[begin // 2 : (begin + _CHUNK) // 2].int()
        rounded = out[begin : begin + _CHUNK]
        # In float32 the pairs are gathered straight into the result.
        pairs = rounded.view(torch.float64) if dtype == torch.float32 else table.new_empty(len(indices))
        torch.index_select(table, 0, indices, out=pairs)
        values = pairs.view(torch.float32)[: size - begin]
        whole = values.numel() - values.numel() % block
        scales = absmax[begin // block :]
        values[:whole].view(-1, block).mul_(scales[: whole // block, None])
        if whole < values.numel():
            values[whole:].mul_(scales[whole // block])
        if dtype != torch.float32:
            rounded[: len(values)] = values
    return out[:size].view(weight.out_features, weight.in_features)


def linear(x: torch.Tensor, weight: Nf4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [M, K]. Returns [M, N] in x's dtype: the weight is rounded to x's dtype, as bitsandbytes does for many
    rows.
    """
    return dense.linear(x, dequantize(weight, x.dtype), bias)
