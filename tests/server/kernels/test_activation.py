"""Activations against the formulas that transformers names."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from adaplex_server.kernels.activation import activate


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_new"), ("gelu_tanh", "gelu_fast"), ("relu", "relu")],
)
def test_equals_transformers(ours: str, theirs: str) -> None:
    x = torch.linspace(-6, 6, 120).view(4, 30)
    torch.testing.assert_close(activate(x, ours, False), ACT2FN[theirs](x), rtol=1e-5, atol=1e-6)
    gated = ACT2FN[theirs](x[:, :15]) * x[:, 15:]
    torch.testing.assert_close(activate(x, ours, True), gated, rtol=1e-5, atol=1e-6)
