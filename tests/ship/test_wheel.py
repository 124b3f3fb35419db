"""The wheel: what is in it, what it says of itself, and that it works where there is no checkout."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("proto/adaplex_proto", "adapters/adaplex_adapters", "server/adaplex_server", "loadtest/adaplex_loadtest")


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [one for one in archive.namelist() if one.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_every_file_of_the_packages_is_in_it(names: set[str]) -> None:
    for package in PACKAGES:
        folder = ROOT / package
        files = {p.relative_to(folder.parent) for p in folder.rglob("*") if p.is_file() and p.suffix != ".so"}
        made = {p for p in files if any(part == "__pycache__" or part.startswith(".") for part in p.parts)}
        assert {str(p) for p in files - made} <= names


def test_what_only_runs_from_files_is_in_it(names: set[str]) -> None:
    assert {f"adaplex_server/kernels/cuda/{name}" for name in ("linear4.cu", "linear16.cu", "hopper.cuh")} <= names
    assert {"adaplex_proto/v1/adaplex.proto", "adaplex_server/py.typed", "adaplex_adapters/py.typed"} <= names
    for adapter in ("date-iso", "itn-en", "language-id", "past-tense", "tsql-postgres"):
        kept = {f"adaplex_server/demo/{adapter}/{f}" for f in ("adapter_config.json", "adapter_model.safetensors")}
        assert kept <= names


def test_nothing_else_is_in_it(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert tops == {*(Path(package).name for package in PACKAGES), f"adaplex-{PROJECT['version']}.dist-info"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".so", ".pyc"))]


def test_it_says_what_it_is(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("adaplex", PROJECT["version"])
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert {"train", "ray", "demo", "cpu", "gpu"} <= set(metadata.get_all("Provides-Extra", []))
    assert metadata.get_payload().startswith("# Adaplex")


@pytest.mark.slow
def test_it_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Installed alone into a new environment, which borrows the packages it depends on from this one."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    # A .pth inside the borrowed folder is not followed, so that this checkout stays out of sight.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        return done.stdout

    adaplex = str(python.parent / "adaplex")
    assert run(adaplex, "--version").split() == ["adaplex", PROJECT["version"]]
    assert "serve-train" in str(list(python.parent.iterdir()))
    for command in (("--help",), ("serve", "--help"), ("train", "--help")):
        assert "Usage" in run(adaplex, *command)
    seen = run(
        *(str(python), "-c"),
        "import adaplex_loadtest, adaplex_server.cli.serve, adaplex_server.grpc_api.server\n"
        "import adaplex_server.engine.engine\n"
        "from adaplex_server.cli.demo import demo_adapters\n"
        "print(adaplex_server.__file__, *demo_adapters())",
    ).split()
    assert Path(seen[0]).is_relative_to(site)
    assert seen[1:] == ["date-iso", "itn-en", "language-id", "past-tense", "tsql-postgres"]
