"""LLM.int8 against bitsandbytes' Linear8bitLt, and rows that are what they are alone."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch

from adaplex_server.kernels import llm_int8


def _layer(threshold: float, dtype: torch.dtype, bias: bool) -> bitsandbytes.nn.Linear8bitLt:
    torch.manual_seed(0)
    dense = torch.nn.Linear(96, 40, bias=bias, dtype=dtype)
    layer = bitsandbytes.nn.Linear8bitLt(96, 40, bias=bias, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(dense.state_dict())
    return layer.to(dtype).eval()  # in training it multiplies with the expanded weight


def _inputs(dtype: torch.dtype) -> torch.Tensor:
    """Rows without outliers, with one, with several, in shared and in own columns, and one of zeros."""
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(1))
    x[1, 5], x[2, 5], x[2, 90], x[3, 17], x[5, 5] = 30.0, -9.0, 6.5, 6.0, 5.99
    x[6] *= 4
    x[7] = 0
    return x.to(dtype)


def _ours(layer: bitsandbytes.nn.Linear8bitLt, threshold: float) -> llm_int8.LlmInt8Weight:
    layer(torch.zeros(1, 96, dtype=torch.float16))  # which is when it fills its state
    return llm_int8.LlmInt8Weight(layer.state.CB, layer.state.SCB, threshold)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_as_bitsandbytes_quantizes(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(3)).mul_(0.05).to(dtype)
    weight[3] = 0
    found = llm_int8.quantize(weight)
    codes, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    kept = torch.arange(40) != 3  # theirs divides by zero
    assert torch.equal(found.codes[kept], codes[kept]) and torch.equal(found.absmax, absmax)
    expected = bitsandbytes.functional.int8_vectorwise_dequant(codes, absmax)
    assert torch.equal(llm_int8.dequantize(found)[kept], expected[kept])
    assert bool((llm_int8.dequantize(found)[3] == 0).all())


@pytest.mark.parametrize("threshold", [6.0, 0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_each_row_is_what_bitsandbytes_gives_for_it_alone(threshold: float, dtype: torch.dtype, bias: bool) -> None:
    layer = _layer(threshold, dtype, bias)
    weight, x = _ours(layer, threshold), _inputs(dtype)
    with torch.no_grad():
        found = llm_int8.linear(x, weight, layer.bias)
        for row in range(7):  # theirs divides the row of zeros by zero
            expected = layer(x[row : row + 1].clone())[0]
            # Up to one rounding where outliers are summed in another order.
            tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
            torch.testing.assert_close(found[row], expected, rtol=tolerance, atol=tolerance)
            if threshold == 0:
                assert torch.equal(found[row], expected)
        assert torch.equal(found[7], torch.zeros(40, dtype=dtype) if layer.bias is None else layer.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_neighbour_changes_no_bit(dtype: torch.dtype) -> None:
    """Neither its outliers nor its NaN."""
    weight, x = llm_int8.quantize(torch.randn(40, 96)), _inputs(dtype)
    x[8] = torch.nan
    together = llm_int8.linear(x, weight)
    assert bool(together[8].isnan().all()) and bool(together[:8].isfinite().all())
    for row in range(8):
        assert torch.equal(llm_int8.linear(x[row : row + 1], weight)[0], together[row])


def test_is_the_formula() -> None:
    weight, x = llm_int8.quantize(torch.randn(40, 96)), _inputs(torch.float32)
    torch.testing.assert_close(llm_int8.linear(x, weight), llm_int8.reference(x, weight), rtol=1e-5, atol=1e-5)


def test_stacked_equals_its_parts() -> None:
    parts = [llm_int8.quantize(torch.randn(rows, 96)) for rows in (8, 24)]
    x = _inputs(torch.bfloat16)
    both = torch.cat([llm_int8.linear(x, part) for part in parts], 1)
    assert torch.equal(llm_int8.linear(x, llm_int8.fuse(parts)), both)
