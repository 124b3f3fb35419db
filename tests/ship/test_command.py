"""The command `adaplex` as a shell sees it: quick to answer, with completion and a version."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "adaplex_server", *words],
        env=os.environ | environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("adaplex s", {"serve"}),
        ("adaplex serve --quant", {"--quantize", "--quant-block"}),
        ("adaplex serve --log-level ", {"debug", "info", "warning", "error"}),
        ("adaplex train --learning-rate", {"--learning-rate", "--learning-rate-multiplier"}),
        ("adaplex adapters l", {"list"}),
    ],
)
def test_the_shell_completes(words: str, offered: set[str]) -> None:
    position = str(len(words.split(" ")) - 1)
    # The program's name as the console script has it; `python -m` would have another.
    code = "import sys; sys.argv = ['adaplex']; from adaplex_server.cli import main; main()"
    environment = {"_ADAPLEX_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": position}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert set(done.stdout.split()) == offered, done.stderr


def test_help_and_completion_do_not_wait_for_torch() -> None:
    code = (
        "import sys; import adaplex_server.cli.main; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run("--version").split() == ["adaplex", project["version"]]
