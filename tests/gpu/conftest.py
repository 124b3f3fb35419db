"""Tests that need an NVIDIA GPU. Those of the kernels also run on a CPU, in Triton's interpreter, when
TRITON_INTERPRET=1 is set before pytest starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        runs = torch.cuda.is_available() and not INTERPRETED
        if not runs and not (INTERPRETED and _HERE / "kernels" in item.path.parents):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fresh random inputs for every test, and memory that nothing wrote reads as NaN."""
    torch.manual_seed(int.from_bytes(os.urandom(4)))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
