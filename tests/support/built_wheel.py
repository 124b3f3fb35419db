"""Builds the wheel of a source tree, as `pip wheel` would, without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def build_wheel(source: Path, folder: Path) -> Path:
    """The wheel of `source`, made in the empty `folder`."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (made,) = folder.glob("*.whl")
    return made
