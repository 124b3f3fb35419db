"""The Triton kernels in Triton's interpreter: the GPU's own kernel tests, run on this CPU in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

_KERNEL_TESTS = Path(__file__).parents[2] / "gpu" / "kernels"


@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_kernels_in_the_interpreter() -> None:
    # The variable must be set before triton is imported, and holds for the whole process.
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(_KERNEL_TESTS), "-x", "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
