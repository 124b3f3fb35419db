"""What cannot start says why at once, on one line, with an exit code that is not 0."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest
from running_server import command, free_port


def refused(folder: Path, *options: str, http: int | None = None, grpc: int | None = None) -> str:
    """What a start that must fail says; never a traceback."""
    line = command(http or free_port(), grpc or free_port(), folder, *options)
    ran = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2, ran.stderr
    assert "Traceback" not in ran.stderr
    return ran.stderr


@pytest.mark.parametrize("which", ["http", "grpc"])
def test_a_port_in_use(tmp_path: Path, which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--{which}" in refused(tmp_path, **{which: port})


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    assert "no-such-folder" in refused(tmp_path, "--base", str(tmp_path / "no-such-folder"))


def test_an_unknown_family_is_told_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mystery", "architectures": ["MysteryForCausalLM"]})
    )
    said = refused(tmp_path, "--base", str(tmp_path))
    assert "mystery" in said
    assert "llama" in said


def test_too_little_memory(tmp_path: Path) -> None:
    assert "kv" in refused(tmp_path, "--kv-memory", "100KB").lower()


def test_a_bad_setting(tmp_path: Path) -> None:
    assert "max_rows" in refused(tmp_path, "--max-rows", "none")


def test_an_adapter_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "--adapters" in refused(tmp_path, "--adapters", str(tmp_path / "no-such-folder"))
