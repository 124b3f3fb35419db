"""A linear with 4-bit weights on the GPU: the packed layout, the product for few rows, and dequantization for many.

y[m, n] = sum_k x[m, k] * w[n, k] (+ bias[n]), where w is, rounded to the activations' dtype,

    nf4:   NF4[code[n, k]] * scale[n, k / group]                     Dettmers et al., "QLoRA" (arXiv 2305.14314)
    int4:  (code[n, k] - zero[n, k / group]) * scale[n, k / group]   Frantar et al., "GPTQ" (arXiv 2210.17323)

x [M, K] and y [M, N] in bfloat16 or float16, sums in float32; float32 goes through an exactly dequantized weight.

Few rows (M <= FEW_ROWS): the product is taken as w @ x^T, so that the expanded weight is the tensor core's register
operand and never passes through shared memory. K is cut in `splits` parts when N alone does not fill the machine;
whoever finishes the linear adds the parts in order (`product` returns them, `linear4` their sum). Both the order of K
and the number of parts follow from the weight's shape alone, so a row's result does not depend on M, bit for bit.
Many rows: the weight is expanded into a scratch once and torch multiplies.

Layout, made once at load: K is padded to a multiple of 8 * columns (`columns` is 32 or 16). words [K / (8 * columns),
N, columns] int32: word c of a step covers 8 codes of one output whose k differ by multiples of `columns`; words 2c and
2c + 1 share k = 2c and 2c + 1, the first holding the steps j = 0..3 and the second j = 4..7, so that one instruction
sequence yields pairs in the order that the tensor core wants. scales, zeros [K / group, N] in the activations' dtype;
zeros hold zero - 8. Padding has scale 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.gpu.launch import INTERPRETED, cdiv, next_power_of_2
from adaplex_server.kernels.nf4 import nf4_code

Kind = Literal["nf4", "int4"]
FEW_ROWS = 128

_NF4_VALUES = tuple(nf4_code(torch.device("cpu")).tolist())


@dataclass(frozen=True)
class Packed4:
    """A packed weight. n, k: the true features; words, scales, zeros as the module says; table: the sixteen values in
    float32 (on the device).

    dtype: of the activations that it multiplies.
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


def pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    kind: Kind,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Packed4:
    """Lay a weight out for `linear4`.

    codes: [N, K] uint8 below 16. scales, zeros: [N, ceil(K / group)] float (zeros None: 8 everywhere). group:
    in-features that share a scale, a multiple of 32, or K itself.
    """
    n, k = codes.shape
    columns = 32 if k % 256 == 0 else 16
    step = 8 * columns
    padded = cdiv(k, step) * step
    if group >= k:
        group = padded
    elif group % columns:
        raise ValueError(f"groups of {group} in-features cannot be packed: need a multiple of {columns}")
    codes = torch.nn.functional.pad(codes.to(device), (0, padded - k))
    words = torch.empty(padded // step, n, columns, dtype=torch.int32, device=device)
    for begin in range(0, n, 4096):
        words[:, begin : begin + 4096] = _words(codes[begin : begin + 4096], kind, columns)
    groups = cdiv(padded, group)
    table = torch.tensor(_NF4_VALUES if kind == "nf4" else [v - 8.0 for v in range(16)], device=device)
    return Packed4(
        kind=kind,
        n=n,
        k=k,
        group=group,
        columns=columns,
        dtype=dtype,
        words=words,
        scales=_by_group(scales, groups, dtype, device),
        zeros=None if zeros is None else _by_group(zeros.float() - 8, groups, dtype, device),
        table=table,
    )


def _words(codes: torch.Tensor, kind: Kind, columns: int) -> torch.Tensor:
    """[N, K] codes to [K / (8 * columns), N, columns] words."""
    n, k = codes.shape
    steps = k // (8 * columns)
    split = codes.view(n, steps, 8, columns // 2, 2).permute(1, 0, 3, 2, 4).to(torch.int32)
    words = torch.zeros(steps, n, columns // 2, 2, dtype=torch.int32, device=codes.device)
    for j in range(8):
        for odd in range(2):
            # nf4: the two k of a pair are neighbouring nibbles; int4: they are 16 bits apart, so that one `and`
            # extracts both.
            shift = 4 * (2 * (j % 4) + odd) if kind == "nf4" else 4 * (j % 4) + 16 * odd
            words[..., j // 4] |= split[..., j, odd] << shift
    return words.view(steps, n, columns)


def _by_group(values: torch.Tensor, groups: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    values = values.to(device).t()
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
        NF4=weight.kind == "nf4",
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
        NF4=weight.kind == "nf4",
        ZEROS=weight.zeros is not None,
        GROUP=weight.group,
        COLUMNS=weight.columns,
        ASSEMBLY=not INTERPRETED and weight.dtype != torch.float32,
        num_warps=4,
    )
    return out


def _nf4_assembly(dtype: torch.dtype) -> str:
    """Two words to eight pairs of table values: byte permutes (prmt) on the table's high and low bytes, held in eight
    registers.
    """
    bits = [v & 0xFFFF for v in torch.tensor(_NF4_VALUES).to(dtype).view(torch.int16).tolist()]
    lines = ["{", ".reg .b32 i0,i1,b0,b1,n,p,h,l,H0,H1,H2,H3,L0,L1,L2,L3;"]
    for name, shift in (("L", 0), ("H", 8)):
        for i in range(4):
            register = sum(((value >> shift) & 0xFF) << (8 * at) for at, value in enumerate(bits[4 * i : 4 * i + 4]))
            lines.append(f"mov.b32 {name}{i}, 0x{register:08x};")
    for word in range(2):
        source = f"${8 + word}"
        # Three bits of a nibble choose a byte of a register pair; the fourth chooses between the two pairs.
        lines += [f"and.b32 i0, {source}, 0x77777777;", f"shr.u32 b0, {source}, 1;"]
        lines += ["lop3.b32 b0, b0, 0x44444444, 0x32103210, 0xEA;", "shr.u32 i1, i0, 16;", "shr.u32 b1, b0, 16;"]
        for half in range(2):
            index, choice = f"i{half}", f"b{half}"
            for result, table in (("h", "H"), ("l", "L")):
                lines.append(f"prmt.b32 n, {table}0, {table}1, {index};")
                lines.append(f"prmt.b32 p, {table}2, {table}3, {index};")
                lines.append(f"prmt.b32 {result}, n, p, {choice};")
            lines.append(f"prmt.b32 ${4 * word + 2 * half}, l, h, 0x5140;")
            lines.append(f"prmt.b32 ${4 * word + 2 * half + 1}, l, h, 0x7362;")
    return "\n".join([*lines, "}"])


def _int4_assembly(dtype: torch.dtype) -> str:
    """Two words to eight pairs of code - 8: or-ing a code into the mantissa of 2^7 (bfloat16) or 2^10 (float16), then
    subtracting.
    """
    magic, minus, add = (
        ("0x43004300", "0xC308C308", "add.rn.bf16x2")
        if dtype == torch.bfloat16
        else ("0x64006400", "0xE408E408", "add.rn.f16x2")
    )
    lines = ["{", ".reg .b32 t,c;", f"mov.b32 c, {minus};"]
    for word in range(2):
        for j in range(4):
            lines.append(f"shr.u32 t, ${8 + word}, {4 * j};")
            lines.append(f"lop3.b32 t, t, 0x000F000F, {magic}, 0xEA;")
            lines.append(f"{add} ${4 * word + j}, t, c;")
    return "\n".join([*lines, "}"])


_NF4_BF16 = tl.constexpr(_nf4_assembly(torch.bfloat16))
_NF4_FP16 = tl.constexpr(_nf4_assembly(torch.float16))
_INT4_BF16 = tl.constexpr(_int4_assembly(torch.bfloat16))
_INT4_FP16 = tl.constexpr(_int4_assembly(torch.float16))
_EIGHT_BF16 = tl.constexpr((tl.bfloat16,) * 8)
_EIGHT_FP16 = tl.constexpr((tl.float16,) * 8)
_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r")


@triton.jit
def _expand(words, NF4: tl.constexpr, T: tl.constexpr):
    """Words [rows, COLUMNS] to the eight tiles [rows, COLUMNS] of values that they hold."""
    if T == tl.bfloat16:
        values = tl.inline_asm_elementwise(
            _NF4_BF16 if NF4 else _INT4_BF16, _REGISTERS, [words], dtype=_EIGHT_BF16, is_pure=True, pack=2
        )
    else:
        values = tl.inline_asm_elementwise(
            _NF4_FP16 if NF4 else _INT4_FP16, _REGISTERS, [words], dtype=_EIGHT_FP16, is_pure=True, pack=2
        )
    return values


@triton.jit
def _look_up(
    words_ptr, table_ptr, row, column, mask, J: tl.constexpr, NF4: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr
):
    """Tile J of `_expand` without assembly. row: index of the words' first column."""
    word = tl.load(words_ptr + row + (column // 2) * 2 + J // 4, mask=mask, other=0)
    if NF4:
        shift = 4 * (2 * (J % 4) + column % 2)
    else:
        shift = 4 * (J % 4) + 16 * (column % 2)
    return tl.load(table_ptr + ((word >> shift) & 15)).to(T)


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
    NF4: tl.constexpr,
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
    # Tiles of `_expand` that share a scale.
    SHARED: tl.constexpr = GROUP // COLUMNS if GROUP < STEP else 8
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    per = tl.cdiv(steps, SPLITS)
    x_tile = x_ptr + m[None, :].to(tl.int64) * K + column[:, None]
    for step in tl.range(part * per, tl.minimum((part + 1) * per, steps)):
        row = (step * N + n_load[:, None]) * COLUMNS
        if ASSEMBLY:
            values = _expand(tl.load(words_ptr + row + column[None, :]), NF4, T)
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
                w = _look_up(words_ptr, table_ptr, row, column[None, :], n_mask[:, None], j, NF4, COLUMNS, T)
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
    NF4: tl.constexpr,
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
        values = _expand(tl.load(words_ptr + row + column[None, :], mask=mask, other=0), NF4, T)
    for j in tl.static_range(8):
        at = ((step * STEP + j * COLUMNS) // GROUP) * N + n[:, None]
        if ASSEMBLY:
            w = values[j]
        else:
            w = _look_up(words_ptr, table_ptr, row, column[None, :], mask, j, NF4, COLUMNS, T)
        if ZEROS:
            w = w - tl.load(zeros_ptr + at, mask=mask, other=0.0)
        w = w * tl.load(scales_ptr + at, mask=mask, other=0.0)
        k = step * STEP + j * COLUMNS + column[None, :]
        tl.store(out_ptr + n[:, None].to(tl.int64) * K + k, w, mask=mask & (k < K))
