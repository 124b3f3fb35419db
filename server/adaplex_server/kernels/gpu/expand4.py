"""Words of eight 4-bit codes to the values that they stand for, in Triton: by assembly on a GPU, by looking them up in
a table elsewhere (the interpreter, float32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.nf4 import code_values


def _table_assembly(values: torch.Tensor, dtype: torch.dtype) -> str:
    """Two words to eight pairs of table values: byte permutes (prmt) on the table's high and low bytes, held in eight
    registers.
    """
    bits = [v & 0xFFFF for v in values.to(dtype).view(torch.int16).tolist()]
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


_NF4 = code_values("nf4", torch.device("cpu"))
_FP4 = code_values("fp4", torch.device("cpu"))
_NF4_BF16 = tl.constexpr(_table_assembly(_NF4, torch.bfloat16))
_NF4_FP16 = tl.constexpr(_table_assembly(_NF4, torch.float16))
_FP4_BF16 = tl.constexpr(_table_assembly(_FP4, torch.bfloat16))
_FP4_FP16 = tl.constexpr(_table_assembly(_FP4, torch.float16))
_INT4_BF16 = tl.constexpr(_int4_assembly(torch.bfloat16))
_INT4_FP16 = tl.constexpr(_int4_assembly(torch.float16))
_EIGHT_BF16 = tl.constexpr((tl.bfloat16,) * 8)
_EIGHT_FP16 = tl.constexpr((tl.float16,) * 8)
_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r")


@triton.jit
def expand(words, KIND: tl.constexpr, T: tl.constexpr):  # noqa: ANN201
    """Words [rows, COLUMNS] to the eight tiles [rows, COLUMNS] of values that they hold. T: bfloat16 or float16."""
    if T == tl.bfloat16:
        values = tl.inline_asm_elementwise(
            _NF4_BF16 if KIND == "nf4" else _FP4_BF16 if KIND == "fp4" else _INT4_BF16,
            _REGISTERS,
            [words],
            dtype=_EIGHT_BF16,
            is_pure=True,
            pack=2,
        )
    else:
        values = tl.inline_asm_elementwise(
            _NF4_FP16 if KIND == "nf4" else _FP4_FP16 if KIND == "fp4" else _INT4_FP16,
            _REGISTERS,
            [words],
            dtype=_EIGHT_FP16,
            is_pure=True,
            pack=2,
        )
    return values


@triton.jit
def look_up(  # noqa: ANN201
    words_ptr,
    table_ptr,
    row,
    column,
    mask,
    J: tl.constexpr,
    KIND: tl.constexpr,
    COLUMNS: tl.constexpr,
    T: tl.constexpr,
):
    """Tile J of `expand` without assembly. row: index of the words' first column."""
    word = tl.load(words_ptr + row + (column // 2) * 2 + J // 4, mask=mask, other=0)
    if KIND == "int4":
        shift = 4 * (J % 4) + 16 * (column % 2)
    else:
        shift = 4 * (2 * (J % 4) + column % 2)
    return tl.load(table_ptr + ((word >> shift) & 15)).to(T)
