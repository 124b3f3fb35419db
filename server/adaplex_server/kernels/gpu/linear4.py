"""A linear with 4-bit weights on the GPU: the packed weight, the product for few rows, and dequantization for many.

y[m, n] = sum_k x[m, k] * w[n, k] (+ bias[n]), where w is, rounded to the activations' dtype,

    nf4, fp4:  TABLE[code[n, k]] * scale[n, k / group]               Dettmers et al., "QLoRA" (arXiv 2305.14314)
    int4:      (code[n, k] - zero[n, k / group]) * scale[n, k / group]   Frantar et al., "GPTQ" (arXiv 2210.17323)

x [M, K] and y [M, N] in bfloat16 or float16, sums in float32; float32 goes through an exactly dequantized weight.

Few rows (M <= FEW_ROWS): the product is taken as w @ x^T, so that the expanded weight is the tensor core's register
operand and never passes through shared memory. K is cut in parts when N alone does not fill the machine; whoever
finishes the linear adds the parts in order (`product` returns them, `linear4` their sum). Both the order of K and the
number of parts follow from the weight's shape alone, so a row's result does not depend on M, bit for bit.
Many rows: the weight is expanded into a scratch once and torch multiplies.

Two layouts, one of which is chosen when a weight is packed (`pack`): on Hopper in bfloat16 that of `kernels.cuda`,
whose kernels then multiply and expand; elsewhere this one, for Triton. K is padded to a multiple of 8 * columns
(`columns` is 32 or 16). words [K / (8 * columns), N, columns] int32: word c of a step covers 8 codes of one output,
whose k differ by multiples of `columns`; words 2c and 2c + 1 share k = 2c and 2c + 1, the first holding the steps
j = 0..3 and the second j = 4..7, so that one instruction sequence yields pairs in the order that the tensor core wants.
scales, zeros [K / group, N] in the activations' dtype; zeros hold zero - 8. Padding has scale 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.cuda import layout4
from adaplex_server.kernels.cuda import linear4 as hopper
from adaplex_server.kernels.gpu.expand4 import expand, look_up
from adaplex_server.kernels.gpu.launch import INTERPRETED, cdiv, next_power_of_2
from adaplex_server.kernels.nf4 import code_values

Kind = Literal["nf4", "fp4", "int4"]
FEW_ROWS = 128


@dataclass(frozen=True)
class Packed4:
    """A packed weight. n, k: the true features; words, scales, zeros as the module says; table: the sixteen values in
    float32 (on the device).

    columns: of the layout for Triton; 0: the layout is that of `kernels.cuda.layout4`. dtype: of the activations that
    it multiplies.
    """

    kind: Kind
    n: int
    k: int
    group: int
    columns: int
    dtype: torch.dtype
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    table: torch.Tensor

    def nbytes(self) -> int:
        """Bytes on the device."""
        parts = (self.words, self.scales, self.zeros)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def table_values(kind: Kind) -> tuple[float, ...]:
    """What the sixteen codes stand for, before zeros and scales."""
    if kind == "int4":
        return tuple(code - 8.0 for code in range(16))
    return tuple(code_values(kind, torch.device("cpu")).tolist())


def pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    kind: Kind,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Packed4:
    """Lay a weight out for `linear4`, as the device's kernels want it.

    codes: [N, K] uint8 below 16. scales, zeros: [N, ceil(K / group)] float (zeros None: 8 everywhere). group:
    in-features that share a scale, a multiple of 32, or K itself.
    """
    lay_out = _for_hopper if hopper.usable(device, dtype, codes.shape[1], group) else _for_triton
    lower = None if zeros is None else zeros.to(device).float() - 8
    return lay_out(codes.to(device), scales.to(device), lower, kind, group, dtype)


def _for_hopper(
    codes: torch.Tensor, scales: torch.Tensor, lower: torch.Tensor | None, kind: Kind, group: int, dtype: torch.dtype
) -> Packed4:
    n, k = codes.shape
    blocks, group = hopper.padded_blocks(n, k), layout4.padded_group(k, group)
    return Packed4(
        kind=kind,
        n=n,
        k=k,
        group=group,
        columns=0,
        dtype=dtype,
        words=layout4.pack_words(codes, blocks),
        scales=layout4.pack_groups(scales.to(dtype), k, group, blocks),
        zeros=None if lower is None else layout4.pack_groups(lower.to(dtype), k, group, blocks),
        table=torch.tensor(table_values(kind), device=codes.device),
    )


def _for_triton(
    codes: torch.Tensor, scales: torch.Tensor, lower: torch.Tensor | None, kind: Kind, group: int, dtype: torch.dtype
) -> Packed4:
    (n, k), device = codes.shape, codes.device
    columns = 32 if k % 256 == 0 else 16
    step = 8 * columns
    padded = cdiv(k, step) * step
    if group >= k:
        group = padded
    elif group % columns:
        raise ValueError(f"groups of {group} in-features cannot be packed: need a multiple of {columns}")
    codes = torch.nn.functional.pad(codes, (0, padded - k))
    words = torch.empty(padded // step, n, columns, dtype=torch.int32, device=device)
    for begin in range(0, n, 4096):
        words[:, begin : begin + 4096] = _words(codes[begin : begin + 4096], kind, columns)
    groups = cdiv(padded, group)
    return Packed4(
        kind=kind,
        n=n,
        k=k,
        group=group,
        columns=columns,
        dtype=dtype,
        words=words,
        scales=_by_group(scales, groups, dtype),
        zeros=None if lower is None else _by_group(lower, groups, dtype),
        table=torch.tensor(table_values(kind), device=device),
    )


def _words(codes: torch.Tensor, kind: Kind, columns: int) -> torch.Tensor:
    """[N, K] codes to [K / (8 * columns), N, columns] words."""
    n, k = codes.shape
    steps = k // (8 * columns)
    split = codes.view(n, steps, 8, columns // 2, 2).permute(1, 0, 3, 2, 4).to(torch.int32)
    words = torch.zeros(steps, n, columns // 2, 2, dtype=torch.int32, device=codes.device)
    for j in range(8):
        for odd in range(2):
            # A table's two k of a pair are neighbouring nibbles; int4's are 16 bits apart, so that one `and`
            # extracts both.
            shift = 4 * (j % 4) + 16 * odd if kind == "int4" else 4 * (2 * (j % 4) + odd)
            words[..., j // 4] |= split[..., j, odd] << shift
    return words.view(steps, n, columns)


def _by_group(values: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    values = values.t()
    return torch.nn.functional.pad(values, (0, 0, 0, groups - values.shape[0])).to(dtype).contiguous()


def linear4(x: torch.Tensor, weight: Packed4, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] in the weight's dtype to [M, N]."""
    if x.shape[0] > FEW_ROWS:
        return torch.nn.functional.linear(x, dequantize4(weight), bias)
    parts = product(x, weight, bias)
    return parts[0] if parts.shape[0] == 1 else add_parts(parts, bias, x.dtype)


def product(x: torch.Tensor, weight: Packed4, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K], M <= FEW_ROWS, to the parts [S, M, N] whose sum is the result.

    S follows from the weight's shape (1 for float32 activations or no rows). S == 1: the result in x's dtype, with
    bias. S > 1: float32 and without bias; to be added in the order of the parts, then bias, and rounded once.
    """
    assert x.shape[0] <= FEW_ROWS, "too many rows for the product for few rows"
    exact = x.dtype == torch.float32 and not INTERPRETED
    if x.shape[0] == 0 or exact:
        return torch.nn.functional.linear(x, dequantize4(weight), bias)[None]
    if weight.columns == 0:
        return hopper.product(x, weight, bias)
    return _few_rows(x.contiguous(), weight, bias)


def add_parts(parts: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """[S, M, N] float32 to [M, N] in dtype: added in order, then bias, rounded once."""
    splits, m, n = parts.shape
    y = torch.empty(m, n, dtype=dtype, device=parts.device)
    block = 1024
    _add_parts[(cdiv(n, block), m)](
        parts, bias if bias is not None else y, y, n, m, SPLITS=splits, BIAS=bias is not None, BLOCK=block
    )
    return y


@dataclass(frozen=True)
class Launch:
    """How the product for few rows is launched. `splits` alone touches the order of sums and must follow from the
    weight's shape.
    """

    block_n: int
    warps: int
    splits: int
    stages: int


def choose_launch(weight: Packed4, block_m: int) -> Launch:
    """Enough programs to fill the machine; the rest as measured on one H200 at the shapes of Llama 3.1 8B."""
    steps = weight.words.shape[0]
    splits = 1
    while cdiv(weight.n, 64) * splits < 250 and splits < 8 and steps >= 2 * splits:
        splits *= 2
    if block_m > 64:
        return Launch(block_n=128, warps=8, splits=splits, stages=2)
    if block_m == 64:
        if splits == 1 and weight.kind == "int4":
            return Launch(block_n=128, warps=8, splits=splits, stages=2)
        crowded = splits > 1 and cdiv(weight.n, 64) * splits > 264
        return Launch(block_n=64, warps=4, splits=splits, stages=2 if crowded else 3)
    if splits == 1:
        return Launch(block_n=128, warps=8, splits=splits, stages=3)
    return Launch(block_n=64, warps=4, splits=splits, stages=3)


def _few_rows(x: torch.Tensor, weight: Packed4, bias: torch.Tensor | None) -> torch.Tensor:
    m, n = x.shape[0], weight.n
    block_m = min(128, max(16, next_power_of_2(m)))
    launch = choose_launch(weight, block_m)
    splits = launch.splits
    parts = torch.empty(splits, m, n, dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    _product[(cdiv(n, launch.block_n), splits, cdiv(m, block_m))](
        x,
        weight.words,
        weight.scales,
        weight.zeros if weight.zeros is not None else weight.scales,
        weight.table,
        bias if bias is not None else weight.scales,
        parts,
        m,
        n,
        weight.k,
        weight.words.shape[0],
        BLOCK_M=block_m,
        BLOCK_N=launch.block_n,
        SPLITS=splits,
        KIND=weight.kind,
        ZEROS=weight.zeros is not None,
        BIAS=bias is not None and splits == 1,
        GROUP=weight.group,
        COLUMNS=weight.columns,
        EVEN_K=weight.k % (8 * weight.columns) == 0,
        EVEN_N=n % launch.block_n == 0,
        ASSEMBLY=not INTERPRETED,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return parts


def dequantize4(weight: Packed4) -> torch.Tensor:
    """The weight [N, K] in its dtype: the very values that the product for few rows multiplies with."""
    if weight.columns == 0:
        return hopper.dequantize(weight)
    out = torch.empty(weight.n, weight.k, dtype=weight.dtype, device=weight.words.device)
    _dequantize[(cdiv(weight.n, 32), weight.words.shape[0])](
        weight.words,
        weight.scales,
        weight.zeros if weight.zeros is not None else weight.scales,
        weight.table,
        out,
        weight.n,
        weight.k,
        BLOCK_N=32,
        KIND=weight.kind,
        ZEROS=weight.zeros is not None,
        GROUP=weight.group,
        COLUMNS=weight.columns,
        ASSEMBLY=not INTERPRETED and weight.dtype != torch.float32,
        num_warps=4,
    )
    return out


# Another number of rows must not ask for another compilation.
@triton.jit(do_not_specialize=["M"])
def _product(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    table_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    steps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One tile [BLOCK_N, BLOCK_M] of y^T (SPLITS 1) or of one part's sums [SPLITS, M, N]."""
    part = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, COLUMNS)
    m_mask = m[None, :] < M
    n_mask = n < N
    n_load = n if EVEN_N else tl.minimum(n, N - 1)
    T: tl.constexpr = x_ptr.dtype.element_ty
    STEP: tl.constexpr = 8 * COLUMNS
    # Tiles of `expand` that share a scale.
    SHARED: tl.constexpr = GROUP // COLUMNS if GROUP < STEP else 8
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    per = tl.cdiv(steps, SPLITS)
    x_tile = x_ptr + m[None, :].to(tl.int64) * K + column[:, None]
    for step in tl.range(part * per, tl.minimum((part + 1) * per, steps)):
        row = (step * N + n_load[:, None]) * COLUMNS
        if ASSEMBLY:
            values = expand(tl.load(words_ptr + row + column[None, :]), KIND, T)
        scale = tl.zeros((BLOCK_N, 1), T)
        zero = tl.zeros((BLOCK_N, 1), T)
        for j in tl.static_range(8):
            if j % SHARED == 0:
                at = ((step * STEP + j * COLUMNS) // GROUP) * N + n_load
                scale = tl.load(scales_ptr + at)[:, None].to(T)
                if ZEROS:
                    zero = tl.load(zeros_ptr + at)[:, None].to(T)
            if ASSEMBLY:
                w = values[j]
            else:
                w = look_up(words_ptr, table_ptr, row, column[None, :], n_mask[:, None], j, KIND, COLUMNS, T)
            if ZEROS:
                w = w - zero
            first = step * STEP + j * COLUMNS
            if EVEN_K:
                x = tl.load(x_tile + first, mask=m_mask, other=0.0)
            else:
                x = tl.load(x_tile + first, mask=m_mask & (first + column[:, None] < K), other=0.0)
            acc = tl.dot(w * scale, x, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + n_load)[:, None].to(tl.float32)
    out = y_ptr + (part * M + m[None, :]).to(tl.int64) * N + n[:, None]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=m_mask & n_mask[:, None])


@triton.jit(do_not_specialize=["M"])
def _add_parts(sums_ptr, bias_ptr, y_ptr, N, M, SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """y = the parts' sums, added in order, plus bias."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    at = tl.program_id(1) * N + n
    total = tl.load(sums_ptr + at, mask=mask, other=0.0)
    for part in tl.static_range(1, SPLITS):
        total += tl.load(sums_ptr + part * M * N + at, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    table_ptr,
    out_ptr,
    N,
    K,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One step's 8 * COLUMNS in-features of BLOCK_N outputs."""
    step = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, COLUMNS)
    mask = (n < N)[:, None]
    T: tl.constexpr = out_ptr.dtype.element_ty
    STEP: tl.constexpr = 8 * COLUMNS
    row = (step * N + n[:, None]) * COLUMNS
    if ASSEMBLY:
        values = expand(tl.load(words_ptr + row + column[None, :], mask=mask, other=0), KIND, T)
    for j in tl.static_range(8):
        at = ((step * STEP + j * COLUMNS) // GROUP) * N + n[:, None]
        if ASSEMBLY:
            w = values[j]
        else:
            w = look_up(words_ptr, table_ptr, row, column[None, :], mask, j, KIND, COLUMNS, T)
        if ZEROS:
            w = w - tl.load(zeros_ptr + at, mask=mask, other=0.0)
        w = w * tl.load(scales_ptr + at, mask=mask, other=0.0)
        k = step * STEP + j * COLUMNS + column[None, :]
        tl.store(out_ptr + n[:, None].to(tl.int64) * K + k, w, mask=mask & (k < K))
