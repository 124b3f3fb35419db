"""The cache of compiled kernels, with a compiler that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaplex_server.kernels.cuda import compiler


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What was compiled, by its options."""
    seen: list[list[str]] = []

    def compile_(text: str, name: str, options: list[str]) -> bytes:
        assert "mbarrier" in text and "product4" in text
        seen.append(options)
        return " ".join(options).encode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "_compile", compile_)
    return seen


def test_compiled_once(made: list[list[str]], tmp_path: Path) -> None:
    first = compiler.compiled("linear4.cu", {"TOKENS": 8}, "sm_90a")
    assert compiler.compiled("linear4.cu", {"TOKENS": 8}, "sm_90a") == first
    assert len(made) == 1
    assert [path.suffix for path in (tmp_path / "adaplex" / "cuda").iterdir()] == [".cubin"]


def test_other_constants_or_another_chip_are_other_code(made: list[list[str]]) -> None:
    compiler.compiled("linear4.cu", {"TOKENS": 8}, "sm_90a")
    compiler.compiled("linear4.cu", {"TOKENS": 16}, "sm_90a")
    compiler.compiled("linear4.cu", {"TOKENS": 8}, "sm_100a")
    assert len(made) == 3
    assert "-DTOKENS=16" in made[1]
    assert "--gpu-architecture=sm_100a" in made[2]


def test_a_folder_that_cannot_be_written_costs_only_time(made: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "adaplex").write_text("not a folder")
    assert compiler.compiled("linear4.cu", {"TOKENS": 8}, "sm_90a") == compiler.compiled(
        "linear4.cu", {"TOKENS": 8}, "sm_90a"
    )
    assert len(made) == 2


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler.torch.version, "cuda", "0.0")
    compiler._nvrtc.cache_clear()
    with pytest.raises(compiler.CompilationError, match="NVRTC of CUDA 0 was not found"):
        compiler._nvrtc()
    compiler._nvrtc.cache_clear()
