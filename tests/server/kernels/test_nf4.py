"""Our NF4 and FP4 against bitsandbytes, bit for bit."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from adaplex_server.kernels import nf4
from adaplex_server.kernels.blockwise8 import dynamic_code, quantize_dynamic8

CPU = torch.device("cpu")


def _weight(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=random) * 0.05).to(dtype)


def _ties() -> torch.Tensor:
    """Every bound between two codes, and the floats beside it, in blocks whose absmax is 1."""
    code = nf4.code_values("nf4", CPU)
    bounds = (code[:-1] + code[1:]) / 2
    around = torch.cat([bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0)), code])
    rows = torch.ones(4, 64)
    rows[:, : len(around)] = around
    return rows * torch.tensor([[1.0], [1.0], [0.5], [3.0]])


CASES = {
    "even": _weight(96, 128, torch.float32),
    "bf16": _weight(64, 576, torch.bfloat16),
    "fp16": _weight(40, 1536, torch.float16),
    "many groups": _weight(300, 640, torch.float32),
    "blocks cross rows": _weight(33, 100, torch.float32),
    "odd": _weight(7, 37, torch.float32),
    "one": _weight(1, 1, torch.float32),
    "zeros": torch.zeros(8, 64),
    "a zero block": torch.cat([torch.zeros(4, 64), _weight(4, 64, torch.float32)]),
    "a zero tail": torch.cat([_weight(1, 64, torch.float32).view(-1), torch.zeros(6)]).view(1, 70),
    "tiny": _weight(16, 64, torch.float32) * 1e-30,
    "huge": _weight(16, 64, torch.float32) * 1e37,
    "ties": _ties(),
}


BLOCKS = [("nf4", 64), ("nf4", 256), ("fp4", 64), ("fp4", 128), ("fp4", 4096)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("kind", "block"), BLOCKS)
def test_codes_and_absmax_equal_bitsandbytes(case: str, kind: nf4.Kind, block: int) -> None:
    weight = CASES[case]
    codes, absmax = nf4.quantize_codes(weight, kind, block)
    expected, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=kind)
    assert torch.equal(codes, expected.view(-1))
    assert torch.equal(absmax.view(torch.int32), state.absmax.view(torch.int32))
    assert torch.equal(nf4.code_values(kind, CPU), state.code)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("kind", "block"), BLOCKS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantized_equals_bitsandbytes(case: str, kind: nf4.Kind, block: int, double_quant: bool) -> None:
    weight = CASES[case]
    packed, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=double_quant)
    ours = nf4.quantize(weight, double_quant=double_quant, kind=kind, block=block)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = dtype
        if weight.shape[1] % 2 == 0 and (block == 64 or weight.shape[1] % block == 0):
            expected = bnb.dequantize_4bit(packed, state, quant_type=kind)
        else:
            expected = _portable(packed, state, weight.shape, dtype)
        assert torch.equal(nf4.dequantize(ours, dtype), expected.view(weight.shape))


def _portable(packed: torch.Tensor, state: bnb.QuantState, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """What bitsandbytes computes elsewhere than in its CPU library, which does not take odd rows, and takes another
    absmax for larger blocks that cross rows: then it differs from what was quantized by far more than the quantization
    did.
    """
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = nf4.unpack_codes(packed.view(-1))[: shape.numel()]
    by_value = absmax.float().repeat_interleave(state.blocksize)[: shape.numel()]
    return (state.code[codes.int()] * by_value).to(dtype)


@pytest.mark.parametrize("case", ["even", "bf16", "fp16", "many groups", "zeros"])
def test_nested_absmax_equals_bitsandbytes(case: str) -> None:
    weight = CASES[case]
    found = nf4.quantize(weight, double_quant=True).absmax
    _, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert isinstance(found, nf4.NestedAbsmax)
    assert torch.equal(found.codes.view(-1), state.absmax)
    assert torch.equal(found.scales, state.state2.absmax)
    assert torch.equal(found.row_offset, state.offset.expand(len(weight)))
    assert torch.equal(found.table, state.state2.code)


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weight(33, 100, torch.float32)
    whole = nf4.quantize(weight, double_quant=True)
    dense = nf4.dequantize(whole)
    monkeypatch.setattr(nf4, "_CHUNK", 256)
    pieces = nf4.quantize(weight, double_quant=True)
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(nf4.dequantize(pieces), dense)


def test_eight_bit_code_equals_bitsandbytes() -> None:
    assert torch.equal(dynamic_code(CPU), bnb.create_dynamic_map())
    random = torch.Generator().manual_seed(3)
    values = torch.cat([torch.randn(200_001, generator=random), torch.zeros(600), torch.randn(77, generator=random)])
    codes, scales = quantize_dynamic8(values)
    expected, state = bnb.quantize_blockwise(values, blocksize=256)
    assert torch.equal(codes, expected)
    assert torch.equal(scales, state.absmax)


@pytest.mark.parametrize("double_quant", [False, True])
def test_fused_equals_its_parts(double_quant: bool) -> None:
    dense = [_weight(rows, 192, torch.float32, seed=rows) for rows in (96, 33, 130)]
    parts = [nf4.quantize(weight, double_quant=double_quant) for weight in dense]
    fused = nf4.fuse(parts)
    assert isinstance(fused.absmax, nf4.NestedAbsmax) == double_quant
    assert torch.equal(nf4.dequantize(fused), torch.cat([nf4.dequantize(part) for part in parts]))


def test_fusing_nested_with_plain_keeps_the_values() -> None:
    parts = [nf4.quantize(_weight(32, 64, torch.float32, seed=i), double_quant=i == 0) for i in range(2)]
    assert torch.equal(nf4.dequantize(nf4.fuse(parts)), torch.cat([nf4.dequantize(part) for part in parts]))
