"""Norms on the CPU against the formulas."""

from __future__ import annotations

import pytest
import torch

from adaplex_server.kernels.norm import add_norm, reference


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference(center: bool, added: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, delta = (torch.randn(5, 72) * 3 + 1).to(dtype), torch.randn(5, 72).to(dtype)
    weight, bias = torch.randn(72).to(dtype), torch.randn(72).to(dtype) if center else None
    total = x + delta if added else x.clone()
    wanted = reference(total, weight, bias, 1e-5, center)
    got_total, got = add_norm(x.clone(), delta if added else None, weight, bias, 1e-5, center)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.equal(got_total, total) and got.dtype == dtype
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_its_own(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 576).to(dtype), torch.randn(576).to(dtype)
    _, together = add_norm(x.clone(), None, weight, None, 1e-5, False)
    _, alone = add_norm(x[7:8].clone(), None, weight, None, 1e-5, False)
    assert torch.equal(together[7:8], alone)
