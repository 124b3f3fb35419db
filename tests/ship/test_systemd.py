"""The systemd unit, checked by systemd's own tools where they are."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adaplex_server.settings import load_settings

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "adaplex.service"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """With a program that is on this machine: systemd looks for it."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not there")
    copied = tmp_path / UNIT.name
    copied.write_text(UNIT.read_text().replace("/opt/adaplex/bin/adaplex", sys.executable))
    return copied


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, timeout=60)


def test_systemd_understands_it(unit: Path) -> None:
    done = analyze("verify", str(unit))
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_closed_off(unit: Path) -> None:
    done = analyze("security", "--offline=true", "--threshold=20", str(unit))
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze is too old to look at a file")
    assert done.returncode == 0, done.stdout


def test_it_stops_after_the_drain_and_its_settings_are_known() -> None:
    text = UNIT.read_text()
    settings = load_settings(None, {}, {})
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert int(stop) > settings.drain_seconds + 10
    for name in re.findall(r"ADAPLEX_([A-Z_]+)=", text):
        assert name == "CONFIG" or name.lower() in type(settings).model_fields
