"""The thread that reads adapters, and the memory they come to."""

from __future__ import annotations

import queue
import threading

import pytest
import torch

from adaplex_adapters.errors import StorageFailed
from adaplex_server.engine.host_adapters import AdapterRead, AdapterReader, HostAdapters
from adaplex_server.engine.host_arena import HostArena
from adaplex_server.model.adapter_image import AdapterImage


def image(revision: str, nbytes: int = 100) -> AdapterImage:
    return AdapterImage(revision, 8, 0, 0, (torch.empty(nbytes, dtype=torch.uint8),), torch.empty(0))


class Source:
    """Tells what is asked of it, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.may_go_on = threading.Event()

    def load(self, revision: str) -> AdapterImage:
        self.calls.append(("load", revision))
        if revision == "bad":
            raise StorageFailed("gone")
        return image(revision)

    def keep(self, image: AdapterImage) -> None:
        assert self.may_go_on.wait(5)
        self.calls.append(("keep", image.revision))

    def forget(self, revision: str) -> None:
        self.calls.append(("forget", revision))


def test_a_result_is_delivered_before_it_is_kept_and_a_drop_comes_after() -> None:
    source, delivered = Source(), queue.SimpleQueue[AdapterRead]()
    reader = AdapterReader(source, delivered.put)
    for revision in ("r1", "bad", "r2"):
        reader.start(revision)
    reader.forget("r1")
    first = delivered.get(timeout=5)
    assert first.revision == "r1" and isinstance(first.result, AdapterImage)
    source.may_go_on.set()
    second, third = delivered.get(timeout=5), delivered.get(timeout=5)
    assert isinstance(second.result, StorageFailed) and third.revision == "r2"
    reader.start("end")
    delivered.get(timeout=5)
    assert source.calls[:6] == [
        ("load", "r1"), ("keep", "r1"), ("load", "bad"), ("load", "r2"), ("keep", "r2"), ("forget", "r1"),
    ]  # fmt: skip


class Asked:
    def __init__(self) -> None:
        self.started: list[str] = []
        self.forgotten: list[str] = []

    def start(self, revision: str) -> None:
        self.started.append(revision)

    def forget(self, revision: str) -> None:
        self.forgotten.append(revision)


def test_two_are_read_ahead_and_none_twice() -> None:
    asked = Asked()
    hosts = HostAdapters(1000, asked)
    hosts.want(["a", "b", "c"], ["a", "b", "c"])
    hosts.want(["a", "b", "c"], ["a", "b", "c"])
    assert asked.started == ["a", "b"] and hosts.reading("a") and not hosts.reading("c")
    hosts.receive(AdapterRead("a", image("a")), ["a", "b", "c"])
    hosts.want(["b", "c"], ["b", "c"])
    assert asked.started == ["a", "b", "c"]


def test_the_least_recently_used_makes_room() -> None:
    asked = Asked()
    hosts = HostAdapters(300, asked)
    for revision in "abc":
        hosts.receive(AdapterRead(revision, image(revision)), [])
    assert hosts.get("a") is not None
    hosts.receive(AdapterRead("d", image("d")), ["c"])
    assert hosts.nbytes == 300 and hosts.rank_pages("b") is None and hosts.rank_pages("a") == 1
    hosts.forget("a")
    assert hosts.nbytes == 200 and asked.forgotten == ["a"]
    hosts.want(["x"], ["c", "d"])
    assert asked.started == ["x"], "a needed one more has room"


def test_no_read_begins_while_the_needed_ones_fill_the_budget() -> None:
    asked = Asked()
    hosts = HostAdapters(200, asked)
    for revision in "ab":
        hosts.receive(AdapterRead(revision, image(revision)), ["a", "b"])
    hosts.want(["x"], ["a", "b", "x"])
    assert asked.started == []
    hosts.want(["x"], ["a", "x"])
    assert asked.started == ["x"]


def test_blocks_are_given_to_one_at_a_time() -> None:
    arena = HostArena(64, pinned=False)
    arena.reserve(200)
    assert arena.nbytes == 192
    first, second = arena.take(3), arena.take(2)
    pointers = {block.data_ptr() for block in (*first, *second)}
    assert len(pointers) == 5 and all(block.shape == (64,) for block in first)
    taken = arena.nbytes
    arena.give(first)
    third = arena.take(3)
    assert arena.nbytes == taken and {b.data_ptr() for b in third} == {b.data_ptr() for b in first}


def test_a_failure_of_memory_is_the_readers_result() -> None:
    class NoMemory(Source):
        def load(self, revision: str) -> AdapterImage:
            raise MemoryError("no pages")

    delivered = queue.SimpleQueue[AdapterRead]()
    AdapterReader(NoMemory(), delivered.put).start("r")
    with pytest.raises(MemoryError):
        raise delivered.get(timeout=5).result  # type: ignore[misc]
