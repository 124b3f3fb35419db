"""Weight-only int8: the rounding of rows, stacking, and products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from adaplex_server.kernels import int8

Quantize = Callable[[torch.Tensor], int8.Int8Weight]
RULES: dict[str, Quantize] = {"absmax": int8.quantize_absmax, "zero-point": int8.quantize_zeropoint}


def _weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05 + 0.02


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_value_is_further_than_half_a_step(rule: str, dtype: torch.dtype) -> None:
    weight = _weight(33, 100).to(dtype)
    found = RULES[rule](weight)
    error = (int8.dequantize(found) - weight.float()).abs()
    assert bool((error <= found.scales * 0.5001).all())
    assert found.nbytes() <= 33 * 100 + 33 * 6


def test_zero_point_uses_the_whole_range_of_a_lopsided_row() -> None:
    weight = _weight(8, 256).abs()
    codes = int8.quantize_zeropoint(weight).codes
    assert bool((codes.amin(1) <= -120).all()) and bool((codes.amax(1) == 127).all())
    absmax, zero_point = (int8.dequantize(rule(weight)) - weight for rule in RULES.values())
    assert zero_point.norm() < 0.6 * absmax.norm()


@pytest.mark.parametrize("rule", RULES)
def test_rows_of_zeros_and_of_one_value(rule: str) -> None:
    weight = torch.tensor([[0.0] * 4, [2.5] * 4, [-1e-30] * 4])
    assert torch.allclose(int8.dequantize(RULES[rule](weight)), weight, rtol=1e-2, atol=1e-33)


def test_zero_is_exact() -> None:
    weight = _weight(16, 64)
    weight[:, ::3] = 0
    for quantize in RULES.values():
        assert bool((int8.dequantize(quantize(weight))[:, ::3] == 0).all())


def test_stacked_equals_its_parts() -> None:
    parts = [quantize(_weight(rows, 96, rows)) for rows, quantize in zip((16, 33), RULES.values(), strict=True)]
    fused = int8.fuse(parts)
    assert fused is not None
    assert torch.equal(int8.dequantize(fused), torch.cat([int8.dequantize(part) for part in parts]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("rows", "columns"), [(40, 96), (33, 101), (128, 576)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_that_rows_keep_their_bits(rule: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = RULES[rule](_weight(rows, columns))
    x = torch.randn(70, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(2)).to(dtype)
    found, expected = int8.linear(x, weight, bias), x.float() @ int8.dequantize(weight).T + bias.float()
    assert (found.float() - expected).norm() <= (1e-6 if dtype == torch.float32 else 0.006) * expected.norm()
    for count in (1, 2, 3, 8, 17, 64):
        assert torch.equal(int8.linear(x[4 : 4 + count], weight, bias), found[4 : 4 + count]), count


@pytest.mark.parametrize("rule", RULES)
def test_a_transposed_weight_is_as_any_other(rule: str) -> None:
    """As GPT-2's linears come; torch's kernel takes rows that lie together."""
    weight, x = _weight(96, 64), torch.randn(3, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(int8.linear(x, RULES[rule](weight.T)), int8.linear(x, RULES[rule](weight.T.contiguous())))
