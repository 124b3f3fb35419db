"""The CUDA kernel of dense weights against its Triton twin, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from adaplex_server.kernels.cuda import linear16 as hopper
from adaplex_server.kernels.gpu.linear16 import linear16

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs compute capability 9.0",
    ),
]


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [17000, 128 * 132, 33001])
def test_product(n: int, out: torch.dtype, monkeypatch: pytest.MonkeyPatch, check: Callable[..., None]) -> None:
    weight = torch.randn(n, 576, dtype=torch.bfloat16, device="cuda")
    bias = torch.randn(n, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(130, 576, dtype=torch.bfloat16, device="cuda")
    for rows in (17, 32, 33, 64, 65, 128, 130):
        assert hopper.usable(x[:rows], weight)
        found = hopper.linear16(x[:rows], weight, bias, out)
        check(found, x[:rows].double() @ weight.double().t() + bias)
        with monkeypatch.context() as patch:
            patch.setattr(hopper, "usable", lambda *_: False)
            twins = linear16(x[:rows], weight, bias, torch.float32)
        assert torch.equal(found, twins.to(out))


def test_few_rows_and_small_weights_stay_with_triton() -> None:
    weight = torch.randn(17000, 576, dtype=torch.bfloat16, device="cuda")
    assert not hopper.usable(weight[:16], weight)
    assert not hopper.usable(weight[:64], weight[:4096])
