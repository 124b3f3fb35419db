"""GPTQ and AWQ weights: four bits each, an affine code per group of in-features. Codes of two and three bits are kept
as four.

    weight[n, order[k]] = (code[n, k] - zero[n, k // group]) * scale[n, k // group]

Source: Frantar et al., "GPTQ" (arXiv 2210.17323); the stored form is AutoGPTQ's. `order` is there with act-order
(desc_act), where the groups were formed in another order of in-features than the checkpoint's: codes are kept sorted
by group, and inputs are permuted instead. This module owns the layout that checkpoints have, the plain-torch
reference, and the product on CPUs by torch's own int4 kernel.

Notation: N out-features, K in-features, G = ceil(K / group) groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from adaplex_server.kernels import dense
from adaplex_server.kernels.packed_words import plus_one, unpack_awq, unpack_words

_ROWS = 2048
# What torch's kernel takes.
_CPU_GROUPS = (256, 128, 64, 32)


@dataclass(frozen=True)
class GptqWeight:
    """One weight [N, K]. Read-only.

    codes: [N, ceil(K / 2)] uint8, sorted by group, the earlier in-feature in the lower half of a byte. scales: [N,
    G] float16 or float32. zeros: [N, G] uint8. order: [K] int64, the in-feature that each code is for; None where
    codes are in the checkpoint's order.
    """

    in_features: int
    group: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    order: torch.Tensor | None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        order = 0 if self.order is None else self.order.nbytes
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes + order


@dataclass(frozen=True)
class CpuInt4:
    """A weight for torch's int4 kernel, which multiplies with (code - 8) * scale + shift. bfloat16 activations.

    packed: torch's own layout of the codes. scale_shift: [K / group, N, 2] bfloat16. group: one of 256, 128, 64, 32,
    not above the weight's own.
    """

    packed: torch.Tensor
    scale_shift: torch.Tensor
    group: int


def pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """codes: [N, K] uint8 below 16. Returns [N, ceil(K / 2)], the earlier of a pair in the lower half."""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_pairs(pairs: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `pack_pairs`: [N, columns] uint8."""
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).view(pairs.shape[0], -1)[:, :columns]


def from_autogptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    group: int,
    version: int,
    bits: int = 4,
) -> GptqWeight:
    """qweight: [K * bits / 32, N] int32. qzeros: [G, N * bits / 32] int32. scales: [G, N] float. g_idx: [K] int, the
    group of each in-feature. bits: 2, 3 or 4.

    version: 1 stores the zeros minus one, 2 as they are. Raises ValueError where g_idx does not fill every group
    evenly.
    """
    codes, zeros, order = stored_codes(qweight, qzeros, g_idx, group, version, bits)
    # Shorter codes are moved to the middle of four bits: the kernels take 8 for the usual zero.
    codes, zeros = (part + (8 - (1 << (bits - 1))) for part in (codes, zeros))
    return GptqWeight(codes.shape[1], group, pack_pairs(codes), scales.t().contiguous(), zeros, order)


def stored_codes(
    qweight: torch.Tensor, qzeros: torch.Tensor, g_idx: torch.Tensor | None, group: int, version: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """AutoGPTQ's tensors (see `from_autogptq`; bits may be 8) as codes [N, K] uint8 sorted by group, zeros [N, G] uint8
    and order [K] or None.
    """
    order = None if g_idx is None else _order(g_idx, group)
    codes = unpack_words(qweight, bits, 0).t()
    codes = codes.contiguous() if order is None else codes[:, order]
    if version == 1:
        qzeros = plus_one(qzeros, bits)
    return codes, unpack_words(qzeros, bits, 1).t().contiguous(), order


def from_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group: int) -> GptqWeight:
    """qweight: [K, N / 8] int32. qzeros: [G, N / 8] int32. scales: [G, N] float. Source: Lin et al., "AWQ" (arXiv
    2306.00978), in the layout of its GEMM kernels.
    """
    codes, zeros = unpack_awq(qweight).t().contiguous(), unpack_awq(qzeros).t().contiguous()
    return GptqWeight(codes.shape[1], group, pack_pairs(codes), scales.t().contiguous(), zeros, None)


def _order(g_idx: torch.Tensor, group: int) -> torch.Tensor | None:
    expected = torch.arange(len(g_idx), device=g_idx.device).div_(group, rounding_mode="floor")
    found, order = torch.sort(g_idx.to(torch.int64), stable=True)
    if not torch.equal(found, expected):
        raise ValueError(f"g_idx does not put {group} in-features into each group")
    return None if torch.equal(g_idx.to(torch.int64), expected) else order


def fuse(weights: Sequence[GptqWeight]) -> GptqWeight | None:
    """The weights stacked along out-features, or None where their groups differ."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if any(w.group != first.group or not same_order(w.order, first.order) for w in weights):
        return None
    return replace(
        first,
        codes=torch.cat([w.codes for w in weights]),
        scales=torch.cat([w.scales for w in weights]),
        zeros=torch.cat([w.zeros for w in weights]),
    )


def same_order(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two weights want their inputs in the same order."""
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def dequantize(weight: GptqWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[N, K] in the checkpoint's order of in-features: the product in float32, then rounded."""
    columns = weight.in_features
    out = torch.empty(weight.out_features, columns, dtype=dtype, device=weight.codes.device)
    for begin in range(0, weight.out_features, _ROWS):
        rows = slice(begin, begin + _ROWS)
        codes = unpack_pairs(weight.codes[rows], columns)
        out[rows] = dequantize_codes(codes, weight.scales[rows], weight.zeros[rows], weight.group).to(dtype)
    if weight.order is None:
        return out
    return torch.empty_like(out).index_copy_(1, weight.order, out)


def dequantize_codes(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group: int) -> torch.Tensor:
    """codes: [N, K] uint8; scales, zeros: [N, G]. Returns [N, K] float32 in the order of the codes."""
    columns = codes.shape[1]
    wide_zeros = zeros.float().repeat_interleave(group, dim=1)[:, :columns]
    wide_scales = scales.float().repeat_interleave(group, dim=1)[:, :columns]
    return (codes.float() - wide_zeros) * wide_scales


def linear(x: torch.Tensor, weight: GptqWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [M, K] in the checkpoint's order. Returns [M, N] in x's dtype: the weight is rounded to x's dtype."""
    return dense.linear(x, dequantize(weight, x.dtype), bias)


def cpu_int4(weight: GptqWeight) -> CpuInt4 | None:
    """The weight for torch's int4 kernel, or None where its shape does not suit it."""
    columns = weight.in_features
    group = next((g for g in _CPU_GROUPS if weight.group % g == 0 and columns % weight.group == 0), None)
    if group is None or weight.out_features % 16 or weight.codes.device.type != "cpu":
        return None
    codes = unpack_pairs(weight.codes, columns).to(torch.int32)
    scales = weight.scales.float().repeat_interleave(weight.group // group, dim=1)
    zeros = weight.zeros.float().repeat_interleave(weight.group // group, dim=1)
    scale_shift = torch.stack([scales, (8 - zeros) * scales], dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()
    return CpuInt4(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scale_shift, group)


def cpu_matmul(x: torch.Tensor, weight: CpuInt4) -> torch.Tensor:
    """x: [M, K] bfloat16, in the order of the codes. Returns [M, N] bfloat16. A row of the result depends on its row
    of x alone.
    """
    out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight.packed, weight.group, weight.scale_shift)
    return out


def cpu_codes(weight: CpuInt4) -> torch.Tensor:
    """The codes [N, K] uint8 again: the product of the identity with scale 1 and shift 0 is code - 8, exactly."""
    groups = weight.scale_shift.shape[0]
    unit = torch.zeros_like(weight.scale_shift)
    unit[..., 0] = 1
    identity = torch.eye(groups * weight.group, dtype=torch.bfloat16)
    return cpu_matmul(identity, replace(weight, scale_shift=unit)).t().add(8).to(torch.uint8)
