"""Data types and the error that all kernel tests share."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter's product of bfloat16 tiles is wrong.
DTYPES = (torch.float32, torch.float16) if _INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
# Of a result against a float64 reference on the same rounded inputs.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

Check = Callable[..., None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture
def check() -> Check:
    """check(actual, expected, factor=1): the relative error is within the tolerance of actual's dtype, and nothing is
    NaN.
    """

    def compare(actual: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> None:
        assert actual.shape == expected.shape
        wanted = expected.double()
        error = ((actual.double() - wanted).norm() / wanted.norm()).item()
        assert error <= factor * TOLERANCE[actual.dtype], error

    return compare
