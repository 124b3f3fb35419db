"""The error that tests of the CUDA kernels allow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}


@pytest.fixture
def check() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """check(actual, expected): the relative error is within the tolerance of actual's dtype, and nothing is NaN."""

    def compare(actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert actual.shape == expected.shape
        wanted = expected.double()
        error = ((actual.double() - wanted).norm() / wanted.norm()).item()
        assert error <= _TOLERANCE[actual.dtype], error

    return compare
