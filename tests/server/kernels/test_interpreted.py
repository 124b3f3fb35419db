"""The Triton kernels in Triton's interpreter: the GPU's own kernel tests, on this CPU in two processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

_PROCESSES = 2
# Longer files take about longer: so each process gets as much.
_KERNEL_TESTS = sorted(
    (Path(__file__).parents[2] / "gpu" / "kernels").glob("test_*.py"), key=lambda path: -path.stat().st_size
)


@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_kernels_in_the_interpreter() -> None:
    runs = [_start(_KERNEL_TESTS[number::_PROCESSES]) for number in range(_PROCESSES)]
    try:
        for run in runs:
            said, _ = run.communicate(timeout=880)
            assert run.returncode == 0, said[-8000:]
            assert " passed" in said and "skipped" not in said
    finally:
        for run in runs:
            run.kill()
            run.communicate()


def _start(files: list[Path]) -> subprocess.Popen[str]:
    """pytest on these files, its output as one."""
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *map(str, files), "-x", "-p", "no:cacheprovider"],
        # The first must be set before triton is imported, and holds for the whole process.
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
