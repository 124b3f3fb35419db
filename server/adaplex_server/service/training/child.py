"""Trains a job (`adaplex_adapters.training.job`) and dies with the process that started it, so that no orphan holds the
job's folder when the server is started again. `python -m adaplex_server.service.training.child FOLDER`
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """Linux alone; a checkpoint makes the sudden end safe."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() == 1:  # it was gone before we asked
        sys.exit("the server is gone")


if __name__ == "__main__":
    if sys.platform == "linux":
        _die_with_parent()
    from adaplex_adapters.training.job import run_job

    sys.exit(run_job(Path(sys.argv[1])))
