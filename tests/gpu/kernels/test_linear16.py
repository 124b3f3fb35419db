"""The dense linear whose rows keep their bits whatever the batch."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from adaplex_server.kernels.gpu.linear16 import linear16

SHAPES = [(70, 200), (130, 576)]
if os.environ.get("TRITON_INTERPRET") != "1":
    SHAPES += [(8200, 32), (20000, 256)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_product(n: int, k: int, dtype: torch.dtype, device: torch.device, check: Callable[..., None]) -> None:
    weight = torch.randn(n, k, dtype=dtype, device=device)
    bias = torch.randn(n, dtype=dtype, device=device)
    x = torch.randn(33, k, dtype=dtype, device=device)
    expected = x.double() @ weight.double().t() + bias
    check(linear16(x, weight, bias), expected)
    wide = linear16(x, weight, bias, torch.float32)
    assert wide.dtype == torch.float32
    check(wide, expected)
    if dtype != torch.float32:
        for rows in (1, 7):
            assert torch.equal(linear16(x[:rows], weight, bias, torch.float32), wide[:rows])
