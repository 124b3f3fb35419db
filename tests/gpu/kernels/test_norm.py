"""Norms with the residual before them, and the activations of an MLP."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from adaplex_server.kernels.gpu.activation import activate
from adaplex_server.kernels.gpu.norm import add_norm, add_norm_of_some

Check = Callable[..., None]


@pytest.mark.parametrize("width", [72, 576])
@pytest.mark.parametrize("center", [False, True])
def test_sum_and_norm(width: int, center: bool, dtype: torch.dtype, device: torch.device, check: Check) -> None:
    x, delta = torch.randn(2, 7, width, dtype=dtype, device=device)
    weight, bias = torch.randn(2, width, dtype=dtype, device=device)
    total, normed = add_norm(x, delta, weight, bias if center else None, 1e-5, center)
    assert torch.equal(total, x + delta)
    wide = total.double()
    if center:
        expected = F.layer_norm(wide, (width,), weight.double(), bias.double(), 1e-5)
    else:
        expected = F.rms_norm(wide, (width,), weight.double(), 1e-5)
    check(normed, expected)
    again, alone = add_norm(total[2:3], None, weight, bias if center else None, 1e-5, center)
    assert torch.equal(alone, normed[2:3])
    assert torch.equal(again, total[2:3])


@pytest.mark.parametrize("center", [False, True])
def test_only_some_rows_are_written(center: bool, dtype: torch.dtype, device: torch.device) -> None:
    x, delta = torch.randn(2, 5, 72, dtype=dtype, device=device)
    weight, bias = torch.randn(2, 72, dtype=dtype, device=device)
    total, normed = torch.randn(2, 5, 72, dtype=dtype, device=device)
    before = total.clone(), normed.clone()
    slots = torch.tensor([-1, 3, -1, 0, 9], dtype=torch.int32, device=device)
    add_norm_of_some(x, delta, slots, weight, bias if center else None, 1e-5, center, total, normed)
    wanted = add_norm(x, delta, weight, bias if center else None, 1e-5, center)
    own = (slots >= 0)[:, None]
    for found, kept, whole in zip((total, normed), before, wanted, strict=True):
        assert torch.equal(found, torch.where(own, whole, kept))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("relu", F.relu),
    ],
)
def test_activations(
    name: str,
    function: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    check: Check,
) -> None:
    x = torch.randn(3, 2 * 1100, dtype=dtype, device=device) * 3
    gate, up = x.double().chunk(2, dim=1)
    check(activate(x, name, gated=True), function(gate) * up)
    check(activate(x, name, gated=False), function(x.double()))
    edge = torch.tensor([[-1e4, 1e4, 0.0, -60.0]], dtype=dtype, device=device)
    torch.testing.assert_close(activate(edge, name, gated=False), function(edge), rtol=1e-3, atol=1e-3)
