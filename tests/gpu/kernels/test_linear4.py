"""4-bit linears against the plain-torch references of both formats."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from adaplex_server.kernels import gptq, nf4
from adaplex_server.kernels.gpu.linear4 import FEW_ROWS, Packed4, add_parts, dequantize4, linear4, pack, product

Check = Callable[..., None]
# (outputs, inputs): neither outputs nor inputs are multiples of a tile in the first; padded inputs in the second; split
# sums in all.
SHAPES = ((70, 192), (33, 576), (64, 512))
GPTQ_SHAPES = SHAPES[1:2] if os.environ.get("TRITON_INTERPRET") == "1" else SHAPES


def packed_nf4(
    n: int, k: int, dtype: torch.dtype, device: torch.device, kind: nf4.Kind = "nf4"
) -> tuple[Packed4, torch.Tensor]:
    """A random weight packed, and its reference values [n, k] in float32."""
    weight = nf4.quantize(torch.randn(n, k), double_quant=False, kind=kind)
    codes = nf4.unpack_codes(weight.codes).view(n, k)
    packed = pack(codes, weight.plain_absmax().view(n, -1), None, kind, nf4.BLOCK, dtype, device)
    return packed, nf4.dequantize(weight).to(device)


def packed_gptq(
    n: int, k: int, group: int, symmetric: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Packed4, torch.Tensor]:
    groups = -(-k // group)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scales = (torch.rand(n, groups) + 0.5) * 0.01
    zeros = torch.full((n, groups), 8) if symmetric else torch.randint(0, 16, (n, groups))
    packed = pack(codes, scales, None if symmetric else zeros, "int4", group, dtype, device)
    return packed, gptq.dequantize_codes(codes, scales, zeros, group).to(device)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_nf4_values_and_product(n: int, k: int, dtype: torch.dtype, device: torch.device, check: Check) -> None:
    packed, weight = packed_nf4(n, k, dtype, device)
    check(dequantize4(packed), weight)
    _product(packed, dtype, device, check)


def test_fp4_values_and_product(dtype: torch.dtype, device: torch.device, check: Check) -> None:
    packed, weight = packed_nf4(33, 192, dtype, device, "fp4")
    check(dequantize4(packed), weight)
    _product(packed, dtype, device, check)


@pytest.mark.parametrize(("n", "k"), GPTQ_SHAPES)
@pytest.mark.parametrize(("group", "symmetric"), [(32, False), (64, True), (128, False), (4096, False)])
def test_gptq_values_and_product(
    n: int, k: int, group: int, symmetric: bool, dtype: torch.dtype, device: torch.device, check: Check
) -> None:
    packed, weight = packed_gptq(n, k, min(group, k), symmetric, dtype, device)
    check(dequantize4(packed), weight)
    _product(packed, dtype, device, check)


def _product(packed: Packed4, dtype: torch.dtype, device: torch.device, check: Check) -> None:
    """For odd numbers of rows, each row the same bits whatever the number, with and without bias."""
    x = torch.randn(33, packed.k, dtype=dtype, device=device)
    bias = torch.randn(packed.n, dtype=dtype, device=device)
    expected = x.double() @ dequantize4(packed).double().t() + bias
    whole = linear4(x, packed, bias)
    check(whole, expected)
    check(linear4(x[:7], packed), expected[:7] - bias)
    parts = product(x, packed, bias)
    alone = parts[0] if len(parts) == 1 else add_parts(parts, bias, dtype)
    assert torch.equal(alone, whole)
    assert parts.dtype == (dtype if len(parts) == 1 else torch.float32)
    if dtype != torch.float32:  # on a GPU, float32 is torch's own product
        assert torch.equal(linear4(x[:1], packed, bias), whole[:1])
        assert torch.equal(linear4(x[:17], packed, bias), whole[:17])


def test_a_row_of_nan_stays_alone(dtype: torch.dtype, device: torch.device) -> None:
    packed, _ = packed_nf4(70, 192, dtype, device)
    x = torch.randn(9, 192, dtype=dtype, device=device)
    clean = linear4(x, packed)
    x[4] = float("nan")
    dirty = linear4(x, packed)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(dirty[others], clean[others])
    assert dirty[4].isnan().all()


def test_many_rows_use_the_same_weight(dtype: torch.dtype, device: torch.device, check: Check) -> None:
    packed, _ = packed_nf4(70, 192, dtype, device)
    x = torch.randn(FEW_ROWS + 1, 192, dtype=dtype, device=device)
    check(linear4(x, packed), x.double() @ dequantize4(packed).double().t())


def test_no_rows(device: torch.device) -> None:
    packed, _ = packed_nf4(64, 192, torch.float16, device)
    assert linear4(torch.empty(0, 192, dtype=torch.float16, device=device), packed).shape == (0, 64)


def test_groups_that_do_not_fit_are_refused(device: torch.device) -> None:
    codes = torch.zeros(4, 96, dtype=torch.uint8)
    with pytest.raises(ValueError, match="groups of 24"):
        pack(codes, torch.ones(4, 4), None, "int4", 24, torch.float16, device)
