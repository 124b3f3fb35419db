"""Linears with 8-bit weights: against the expanded weight, and rows that keep their bits whatever the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from adaplex_server.kernels import int8, llm_int8
from adaplex_server.kernels.gpu.linear8 import linear8
from adaplex_server.kernels.gpu.linear8 import llm_int8 as product

Check = Callable[..., None]


def grouped(weight: torch.Tensor, group: int) -> int8.Int8Weight:
    """Zero-point codes whose groups are `group` in-features."""
    n, k = weight.shape
    flat = int8.quantize_zeropoint(weight.view(-1, group))
    assert flat.zeros is not None
    return int8.Int8Weight(group, flat.codes.view(n, k), flat.scales.view(n, -1), flat.zeros.view(n, -1))


WEIGHTS = {
    "absmax": (130, 200, int8.quantize_absmax),
    "zero-point": (64, 576, int8.quantize_zeropoint),
    "groups of 32": (70, 96, lambda w: grouped(w, 32)),
    "groups of 128": (33, 256, lambda w: grouped(w, 128)),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weight_only(case: str, dtype: torch.dtype, device: torch.device, check: Check) -> None:
    n, k, quantize = WEIGHTS[case]
    weight = quantize(torch.randn(n, k, device=device))
    bias = torch.randn(n, dtype=dtype, device=device)
    x = torch.randn(33, k, dtype=dtype, device=device)
    found = linear8(x, weight.codes, weight.scales, weight.zeros, weight.group, bias)
    check(found, x.double() @ int8.dequantize(weight).double().t() + bias)
    if dtype != torch.float32:
        for rows in (1, 7):
            few = linear8(x[:rows], weight.codes, weight.scales, weight.zeros, weight.group, bias)
            assert torch.equal(few, found[:rows])


def gpu_llm_int8(x: torch.Tensor, weight: llm_int8.LlmInt8Weight, bias: torch.Tensor) -> torch.Tensor:
    """Also where the interpreter runs the kernel on the CPU."""
    half = x.half()
    outliers = half.abs() >= (weight.threshold or torch.inf)
    codes, absmax = llm_int8.quantize_rows(half.masked_fill(outliers, 0))
    return product(x, codes, absmax, weight.codes, weight.absmax, weight.threshold, bias)


@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize(("n", "k"), [(130, 200), (64, 576)])
def test_llm_int8(n: int, k: int, threshold: float, dtype: torch.dtype, device: torch.device, check: Check) -> None:
    weight = llm_int8.quantize(torch.randn(n, k, device=device), threshold)
    bias = torch.randn(n, dtype=dtype, device=device)
    x = torch.randn(33, k, dtype=dtype, device=device)
    x[::2, 5] = 30
    x[::3, k - 1] = -8
    x[4] = 0
    found = gpu_llm_int8(x, weight, bias)
    # The outliers' weight is rounded to x's dtype, which the reference does not do.
    check(found, llm_int8.reference(x.float(), weight, bias.float()), factor=4.0 if dtype != torch.float32 else 1.0)
    x[1] = torch.nan
    for rows in (1, 7):
        few = gpu_llm_int8(x[:rows], weight, bias)
        kept = [row for row in range(rows) if row != 1]
        assert torch.equal(few[kept], found[kept])
        assert rows == 1 or bool(few[1].isnan().all())
