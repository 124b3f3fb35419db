"""NF4 and FP4 linears on CPUs with AVX512-BF16, through the C library that bitsandbytes ships (no import of
bitsandbytes itself).

    out[m, n] = sum_k x[m, k] * CODE[code[n, k]] * absmax[n, k / block]

with absmax rounded to bfloat16, sums in float32, and out in bfloat16.

The library wants its own order of codes: for 32 out-features at a time, the 32 bytes of two in-features each; in
these bytes feature i's pair of codes are split between halves. A row of `out` depends on its row of x alone,
whatever M is. Before it is used, the library multiplies a small weight and is compared with the reference, so that a
release with another layout is turned down instead of believed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from adaplex_server.kernels import nf4

ROWS = 32
_log = logging.getLogger(__name__)
Multiply = Callable[[int, int, int, int, int, int, int, int, int, int], None]


@dataclass(frozen=True)
class PackedNf4:
    """codes: [N / 32, K / 2, 32] uint8 in the library's order. absmax: [K / block, N] bfloat16. N % 32 == 0, K % block
    == 0. kind, block: as in Nf4Weight.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    kind: nf4.Kind = "nf4"
    block: int = nf4.BLOCK


def fits(weight: nf4.Nf4Weight) -> bool:
    """Whether the library can multiply this weight."""
    return weight.row_aligned and weight.out_features % ROWS == 0 and weight.codes.device.type == "cpu"


def pack(weight: nf4.Nf4Weight) -> PackedNf4:
    """Reorder a weight for the library. The exact absmax is not in the result: keep it for `unpack`."""
    rows, columns = weight.out_features, weight.in_features
    # [group, k pair, feature * 2]: 64 codes, of which byte i holds number i below and number 32 + i above.
    paired = weight.codes.view(rows // ROWS, ROWS, columns // 2).transpose(1, 2)
    split = torch.stack([paired >> 4, paired & 15], dim=-1).view(rows // ROWS, columns // 2, 2, ROWS)
    absmax = weight.plain_absmax().view(rows, columns // weight.block).T.to(torch.bfloat16).contiguous()
    return PackedNf4(split[:, :, 0] | (split[:, :, 1] << 4), absmax, weight.kind, weight.block)


def unpack(packed: PackedNf4, absmax: torch.Tensor | nf4.NestedAbsmax) -> nf4.Nf4Weight:
    """The weight that was packed, given its exact absmax."""
    groups, pairs, _ = packed.codes.shape
    split = torch.stack([packed.codes & 15, packed.codes >> 4], dim=2).view(groups, pairs, ROWS, 2)
    codes = ((split[..., 0] << 4) | split[..., 1]).transpose(1, 2).reshape(-1)
    return nf4.Nf4Weight(groups * ROWS, pairs * 2, codes, absmax, packed.kind, packed.block)


def matmul(x: torch.Tensor, packed: PackedNf4, multiply: Multiply) -> torch.Tensor:
    """x: [M, K] bfloat16, rows contiguous. Returns [M, N] bfloat16."""
    rows, columns = x.shape
    width = packed.absmax.shape[1]
    out = torch.empty((rows, width), dtype=torch.bfloat16)
    multiply(
        rows,
        width,
        columns,
        x.data_ptr(),
        packed.codes.data_ptr(),
        packed.absmax.data_ptr(),
        out.data_ptr(),
        packed.block,
        x.stride(0),
        width,
    )
    return out


@cache
def library(kind: nf4.Kind = "nf4", block: int = nf4.BLOCK) -> Multiply | None:
    """The library's multiplication for weights of this kind and block, or None (with a line in the log) where there is
    none that computes what it should.
    """
    multiply = _open(kind)
    if multiply is None:
        return None
    random = torch.Generator().manual_seed(0)
    columns = 3 * max(block, 2 * ROWS)
    dense = torch.randn(2 * ROWS, columns, generator=random)
    weight = nf4.quantize(dense, double_quant=False, kind=kind, block=block)
    x = torch.randn(5, columns, generator=random).bfloat16()
    expected = x.float() @ nf4.dequantize(weight).T
    found = matmul(x, pack(weight), multiply).float()
    if not torch.allclose(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())):
        _log.warning(
            "bitsandbytes' CPU library multiplies %s in blocks of %d in another way than expected; on this CPU it will "
            "be slow",
            kind.upper(),
            block,
        )
        return None
    return multiply


def _open(kind: nf4.Kind) -> Multiply | None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    package = importlib.util.find_spec("bitsandbytes")
    if package is None or package.origin is None:
        _log.warning("bitsandbytes is not installed; 4-bit on this CPU will be slow (pip install 'adaplex[cpu]')")
        return None
    path = os.fspath(Path(package.origin).with_name("libbitsandbytes_cpu.so"))
    try:
        opened = ctypes.CDLL(path)
        if not opened.has_avx512bf16_cpu():
            return None
        multiply = getattr(opened, f"gemv_4bit_inference_cpu_{kind}_bf16")
    except (OSError, AttributeError) as error:
        _log.warning("bitsandbytes' CPU library cannot be used, 4-bit on this CPU will be slow: %s", error)
        return None
    multiply.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
    multiply.restype = None
    return multiply
