"""The Dockerfile, as far as it can be checked without a container engine: its linter, its promises, its context."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from adaplex_server.cli.main import app
from adaplex_server.settings import load_settings
from support.built_wheel import build_wheel

ROOT = Path(__file__).parents[2]
Instruction = tuple[str, str]


def instructions() -> list[Instruction]:
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def stages() -> dict[str, list[Instruction]]:
    """What makes each stage, its parents' instructions first."""
    made: dict[str, list[Instruction]] = {}
    for word, rest in instructions():
        if word == "FROM":
            parent, _, name = rest.split()
            made[name] = list(made.get(parent, ()))
            last = made[name]
        elif made:
            last.append((word, rest))
    return made


def environment(stage: str) -> dict[str, str]:
    words = " ".join(rest for word, rest in stages()[stage] if word == "ENV").split()
    return dict(word.split("=", 1) for word in words)


def test_the_linter_finds_nothing() -> None:
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("hadolint is not there")
    done = subprocess.run([linter, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_an_image_serves_as_nobody_in_particular(stage: str) -> None:
    made = stages()[stage]
    assert [rest for word, rest in made if word == "USER"] == ["10001:10001"]
    (check,) = [rest for word, rest in made if word == "HEALTHCHECK"]
    assert check.endswith('CMD ["adaplex", "health"]')
    assert ("ENTRYPOINT", '["adaplex"]') in made
    assert {info.name for info in app.registered_commands} >= {"serve", "health"}
    settings = load_settings(None, environment(stage), {})
    assert {f"EXPOSE {settings.http.split(':')[1]} {settings.grpc.split(':')[1]}"} == {
        f"{word} {rest}" for word, rest in made if word == "EXPOSE"
    }
    volumes = [rest for word, rest in made if word == "VOLUME"]
    assert all(settings.data_dir.is_relative_to(volume) for volume in volumes)


def test_the_default_image_needs_no_gpu() -> None:
    assert list(stages())[-1] == "cpu"


def test_bases_are_pinned_and_nothing_is_secret() -> None:
    (image,) = [rest.split("=")[1] for word, rest in instructions() if word == "ARG" and "IMAGE" in rest]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", image)
    froms = [rest.split() for word, rest in instructions() if word == "FROM"]
    known = {"${PYTHON_IMAGE}", *(words[-1] for words in froms)}
    assert {words[0] for words in froms} <= known
    given = " ".join(rest for word, rest in instructions() if word in ("ARG", "ENV"))
    assert not re.search(r"(?i)secret|token|password|api_?key", given)


@pytest.mark.slow
def test_the_context_holds_what_the_wheel_is_made_of(names: set[str], tmp_path: Path) -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for path in (path for pattern in kept for path in ROOT.glob(pattern)):
        target = tmp_path / "context" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__", ".mypy_cache"))
        else:
            shutil.copy(path, target)
    with zipfile.ZipFile(build_wheel(tmp_path / "context", tmp_path)) as archive:
        assert set(archive.namelist()) == names
