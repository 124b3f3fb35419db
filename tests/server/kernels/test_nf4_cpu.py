"""bitsandbytes' CPU library, called without bitsandbytes: our packing, and what the engine relies on."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from adaplex_server.kernels import nf4, nf4_cpu

SHAPES = [(960, 576), (576, 1536), (32, 64), (96, 192)]
OTHERS: list[tuple[nf4.Kind, int]] = [("fp4", 64), ("nf4", 32), ("nf4", 128), ("fp4", 256), ("nf4", 1024)]


def _weight(rows: int, columns: int, kind: nf4.Kind = "nf4", block: int = nf4.BLOCK) -> nf4.Nf4Weight:
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.05
    return nf4.quantize(dense, double_quant=True, kind=kind, block=block)


@pytest.fixture(scope="module")
def multiply() -> nf4_cpu.Multiply:
    found = nf4_cpu.library()
    if found is None:
        pytest.skip("this CPU has no AVX512-BF16")
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_equals_bitsandbytes_and_comes_back(shape: tuple[int, int]) -> None:
    weight = _weight(*shape)
    dense = torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])) * 0.05
    codes, state = bnb.quantize_4bit(dense, blocksize=64, quant_type="nf4", compress_statistics=True)
    expected, state = bnb._convert_weight_packed_for_cpu(codes, state)
    packed = nf4_cpu.pack(weight)
    assert torch.equal(packed.codes.reshape(-1), expected.reshape(-1))
    assert torch.equal(packed.absmax, state.absmax)
    assert torch.equal(nf4_cpu.unpack(packed, weight.absmax).codes, weight.codes)


@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_the_reference_with_sixteen_bit_weights(shape: tuple[int, int], multiply: nf4_cpu.Multiply) -> None:
    weight = _weight(*shape)
    x = torch.randn(9, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    found = nf4_cpu.matmul(x, nf4_cpu.pack(weight), multiply).float()
    expected = x.float() @ nf4.dequantize(weight).T
    assert (found - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_the_others(shape: tuple[int, int], multiply: nf4_cpu.Multiply) -> None:
    packed = nf4_cpu.pack(_weight(*shape))
    x = torch.randn(160, shape[1], generator=torch.Generator().manual_seed(2)).bfloat16()
    whole = nf4_cpu.matmul(x, packed, multiply)
    for rows in (1, 2, 3, 5, 8, 17, 64, 100):
        assert torch.equal(nf4_cpu.matmul(x[11 : 11 + rows], packed, multiply), whole[11 : 11 + rows]), rows


@pytest.mark.parametrize(("kind", "block"), OTHERS)
def test_fp4_and_other_blocks(kind: nf4.Kind, block: int, multiply: nf4_cpu.Multiply) -> None:
    own = nf4_cpu.library(kind, block)
    if own is None:
        pytest.skip("this library does not multiply them")
    weight = _weight(96, 2048, kind, block)
    packed = nf4_cpu.pack(weight)
    assert torch.equal(nf4_cpu.unpack(packed, weight.absmax).codes, weight.codes)
    x = torch.randn(40, 2048, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, expected = nf4_cpu.matmul(x, packed, own), x.float() @ nf4.dequantize(weight).T
    assert (found.float() - expected).norm() <= 0.01 * expected.norm()
    for rows in (1, 2, 7, 17):
        assert torch.equal(nf4_cpu.matmul(x[11 : 11 + rows], packed, own), found[11 : 11 + rows]), rows


def test_rows_may_be_strided(multiply: nf4_cpu.Multiply) -> None:
    packed = nf4_cpu.pack(_weight(96, 192))
    x = torch.randn(4, 500, generator=torch.Generator().manual_seed(3)).bfloat16()
    part = x[:, 100:292]
    assert torch.equal(nf4_cpu.matmul(part, packed, multiply), nf4_cpu.matmul(part.contiguous(), packed, multiply))


def test_a_library_that_computes_something_else_is_turned_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_cpu, "_open", lambda kind: lambda *arguments: None)
    nf4_cpu.library.cache_clear()
    try:
        assert nf4_cpu.library() is None
    finally:
        monkeypatch.undo()
        nf4_cpu.library.cache_clear()
