"""Folders in the cache are whole or not there, also with two makers at once and with one that is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from adaplex_adapters.errors import StartupError
from adaplex_server.bases.cache import cache_root, ensure_folder


def _make(part: Path) -> None:
    (part / "a").write_text("made")


def _slow_make(part: Path) -> None:
    (part / "a").write_text("half")
    (part.parent / "started").touch()
    time.sleep(60)


def test_made_once(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "thing"
    assert ensure_folder(target, _make) == target
    assert (target / "a").read_text() == "made"
    ensure_folder(target, lambda part: pytest.fail("made twice"))


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        (part / "a").touch()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        ensure_folder(tmp_path / "thing", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]
    ensure_folder(tmp_path / "thing", _make)


def test_a_killed_maker_is_cleaned_up_after(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=ensure_folder, args=(tmp_path / "thing", _slow_make))
    process.start()
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    assert not (tmp_path / "thing").exists()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    ensure_folder(tmp_path / "thing", _make)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["started", "thing", "thing.lock"]


def _count_and_make(target: Path) -> None:
    def make(part: Path) -> None:
        with (target.parent / "makers").open("a") as file:
            file.write("x")
        time.sleep(0.2)
        _make(part)

    ensure_folder(target, make)
    assert (target / "a").read_text() == "made"


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count_and_make, args=(tmp_path / "thing",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "makers").read_text() == "x"


def test_a_disk_that_refuses_is_a_startup_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="XDG_CACHE_HOME"):
        ensure_folder(tmp_path / "file" / "thing", _make)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "adaplex"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_root() == Path.home() / ".cache" / "adaplex"
