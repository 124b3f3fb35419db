"""The store: whole or not at all, whatever fails or dies in between."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.errors import InvalidAdapter, NotFound, StorageFailed
from adaplex_adapters.reader import read_adapter
from adaplex_adapters.spec import Adapter
from adaplex_adapters.store import AdapterStore


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


@pytest.fixture
def adapter(write_lora: Any, base: BaseShape) -> Adapter:
    config = {"base_model_name_or_path": "org/base", "alpha_pattern": {r"layers\.1\..*": 3}, "use_rslora": True}
    return read_adapter(write_lora(rank=3, config=config, dtype=torch.bfloat16), base)


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def staging(store: AdapterStore) -> list[Path]:
    return list(store._staging.iterdir())


def test_it_comes_back(store: AdapterStore, adapter: Adapter, base: BaseShape) -> None:
    revision = store.commit(adapter)
    assert revision == adapter.spec.revision and store.contains(revision) and store.revisions() == {revision}
    found = store.read(revision, base)
    assert found.spec == adapter.spec and list(found.modules) == list(adapter.modules)
    for path, module in found.modules.items():
        assert torch.equal(module.a, adapter.modules[path].a) and torch.equal(module.b, adapter.modules[path].b)
        assert module.scaling == adapter.modules[path].scaling
    assert store.size(revision) > adapter.spec.nbytes
    assert read_adapter(store.folder(revision), base).spec == adapter.spec


def test_commit_is_idempotent(store: AdapterStore, adapter: Adapter, tmp_path: Path) -> None:
    store.commit(adapter)
    before = [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in files(tmp_path / "adapters")]
    store.commit(adapter)
    AdapterStore(tmp_path / "adapters").commit(adapter)
    assert [(p, p.stat().st_mtime_ns, p.stat().st_ino) for p in files(tmp_path / "adapters")] == before
    assert staging(store) == []


def test_many_commits_at_once(store: AdapterStore, adapter: Adapter, base: BaseShape) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            store.commit(adapter)
            store.read(adapter.spec.revision, base)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and store.revisions() == {adapter.spec.revision} and staging(store) == []


def test_delete(store: AdapterStore, adapter: Adapter, base: BaseShape) -> None:
    revision = store.commit(adapter)
    store.delete(revision)
    assert not store.contains(revision) and staging(store) == []
    for call in (lambda: store.read(revision, base), lambda: store.delete(revision), lambda: store.size(revision)):
        with pytest.raises(NotFound):
            call()


@pytest.mark.parametrize("revision", ["..", "", "../../etc", "a" * 63, "A" * 64, "a" * 64 + "/"])
def test_a_revision_is_no_path(store: AdapterStore, revision: str) -> None:
    with pytest.raises(NotFound):
        store.contains(revision)


def test_prune(store: AdapterStore, adapter: Adapter, write_lora: Any, base: BaseShape) -> None:
    kept = store.commit(adapter)
    gone = store.commit(read_adapter(write_lora(), base))
    (store._staging / "leftover").mkdir()
    (store._staging / "leftover" / "half").write_text("x")
    (store._revisions / "junk").write_text("x")
    assert set(store.prune({kept})) == {gone, "junk"}
    assert store.revisions() == {kept} and staging(store) == []
    assert store.read(kept, base).spec == adapter.spec


def edit_tensor(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def edit_alpha(folder: Path) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_alpha"] = 100
    file.write_text(json.dumps(config))


EDITS: dict[str, Callable[[Path], object]] = {
    "a tensor": edit_tensor,
    "the alpha": edit_alpha,
    "truncated": lambda folder: os.truncate(folder / "adapter_model.safetensors", 100),
    "config gone": lambda folder: (folder / "adapter_config.json").unlink(),
    "tensors gone": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "a link": lambda folder: (
        (folder / "adapter_config.json").unlink(),
        (folder / "adapter_config.json").symlink_to("x"),
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_behind_the_back_are_found_and_healed(
    edit: str, store: AdapterStore, adapter: Adapter, base: BaseShape
) -> None:
    revision = store.commit(adapter)
    EDITS[edit](store.folder(revision))
    with pytest.raises(StorageFailed, match=r"changed or damaged.*Upload the adapter again"):
        store.read(revision, base)
    assert store.commit(adapter) == revision
    assert store.read(revision, base).spec == adapter.spec and staging(store) == []


def test_another_base_is_not_damage(store: AdapterStore, adapter: Adapter, make_base: Callable[..., BaseShape]) -> None:
    revision = store.commit(adapter)
    with pytest.raises(InvalidAdapter, match="Wrong base"):
        store.read(revision, make_base(hidden=64))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "rename", "open", "mkdir"])
def test_a_disk_that_refuses(
    call: str, code: int, store: AdapterStore, adapter: Adapter, base: BaseShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of its kind fails in turn: always StorageFailed, nothing half there, and the next commit succeeds."""
    real = getattr(os, call)
    for failing in range(1, 50):
        count = 0

        def refuse(*arguments: Any, failing: int = failing, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == failing:
                raise OSError(code, os.strerror(code))
            return real(*arguments, **named)

        monkeypatch.setattr(os, call, refuse)
        try:
            store.commit(adapter)
        except StorageFailed as error:
            assert "/" not in error.message
        finally:
            monkeypatch.setattr(os, call, real)
        if count < failing:
            break
        for revision in store.revisions():  # there whole, or not at all
            assert store.read(revision, base).spec == adapter.spec
            store.delete(revision)
        if call == "open":  # the cleaning opens folders too, and what it could not remove is pruned at the next start
            store.prune(set())
        assert staging(store) == []
    assert failing > 1
    assert store.read(store.commit(adapter), base).spec == adapter.spec


def test_short_writes(store: AdapterStore, adapter: Adapter, base: BaseShape, monkeypatch: Any) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:7])))
    revision = store.commit(adapter)
    monkeypatch.undo()
    assert store.read(revision, base).spec == adapter.spec


def test_a_kill_between_any_two_calls(tmp_path: Path, write_lora: Any, base: BaseShape) -> None:
    """kill -9 before and after each system call of a commit: after a restart the adapter is whole or absent."""
    folder = write_lora()
    revision = read_adapter(folder, base).spec.revision
    outcomes = _kill_at_every_call(tmp_path, folder, revision, base)
    assert outcomes[0] == (False, False) and outcomes[-1] == (True, True)
    assert (True, False) in outcomes, "no kill came between the rename and the acknowledgement"


def _kill_at_every_call(tmp_path: Path, folder: Path, revision: str, base: BaseShape) -> list[tuple[bool, bool]]:
    """For each place: (the adapter is there after a restart, it was acknowledged)."""
    outcomes = []
    root = tmp_path / "killed"
    run = subprocess.run(
        [sys.executable, "-c", COMMITTER, str(folder), str(root)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    places = [line.split() for line in run.stdout.splitlines()]
    assert len(places) > 20
    for place, status, acknowledged in places:
        store = AdapterStore(root / place)
        there = store.contains(revision)
        if there:
            assert store.read(revision, base).spec.revision == revision
        assert there or acknowledged == "0"
        assert (int(status) == signal.SIGKILL) == (acknowledged == "0")
        store.prune({revision})
        assert list((root / place / "staging").iterdir()) == []
        assert store.commit(read_adapter(folder, base)) == revision
        outcomes.append((there, acknowledged == "1"))
    return outcomes


# Forks a child for each place, since starting Python with torch forty times would take a minute.
COMMITTER = """
import os, signal, sys
from pathlib import Path
from adaplex_adapters.reader import read_unfitted
from adaplex_adapters.store import AdapterStore

adapter = read_unfitted(Path(sys.argv[1]))
root = Path(sys.argv[2])
NAMES = ("mkdir", "open", "write", "fsync", "rename")
REAL = {name: getattr(os, name) for name in NAMES}

def commit_dying_at(place, store, report):
    count = 0
    def dying(real):
        def call(*arguments, **named):
            nonlocal count
            count += 1
            if count == place:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)
        return call
    for name in NAMES:
        setattr(os, name, dying(REAL[name]))
    store.commit(adapter)
    REAL["write"](report, b"1")
    os._exit(0)

for place in range(1, 200):
    store = AdapterStore(root / str(place))
    heard, report = os.pipe()
    child = os.fork()
    if child == 0:
        commit_dying_at(place, store, report)
    os.close(report)
    _, status = os.waitpid(child, 0)
    acknowledged = len(os.read(heard, 1))
    os.close(heard)
    print(place, os.WTERMSIG(status), acknowledged)
    if acknowledged:
        break
"""
