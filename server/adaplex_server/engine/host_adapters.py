"""Adapters in host memory, read from the store by a thread so that no step waits for a disk.

Owns the cache, bounded in bytes, and what is being read. One revision is read at a time; what rows or loads wait for
is not evicted, and a read waits until such ones leave room, so that the bound holds under any traffic (but for one
adapter that is larger than the bound by itself).
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from adaplex_adapters.spec import LoraAdapter
from adaplex_server.model.adapter_pool import RANK_PAGE


@dataclass(frozen=True)
class AdapterRead:
    """A read has ended: with the adapter, or with what went wrong."""

    revision: str
    result: LoraAdapter | Exception


class AdapterReader:
    """The thread. read: from the store (any exception is a result); deliver: called in the thread with each result."""

    def __init__(self, read: Callable[[str], LoraAdapter], deliver: Callable[[AdapterRead], None]) -> None:
        self._read = read
        self._deliver = deliver
        self._asked: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="adapter-reader", daemon=True).start()

    def __call__(self, revision: str) -> None:
        """Have the revision read."""
        self._asked.put(revision)

    def _run(self) -> None:
        while True:
            revision = self._asked.get()
            try:
                result: LoraAdapter | Exception = self._read(revision)
            except Exception as error:
                result = error
            self._deliver(AdapterRead(revision, result))


class HostAdapters:
    """budget: bytes. start_read: asks for a revision; its result comes back through `receive`."""

    def __init__(self, budget: int, start_read: Callable[[str], None]) -> None:
        self._budget = budget
        self._start_read = start_read
        self._adapters: OrderedDict[str, LoraAdapter] = OrderedDict()
        self._reading: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters held."""
        return sum(adapter.spec.nbytes for adapter in self._adapters.values())

    def get(self, revision: str) -> LoraAdapter | None:
        """The adapter, if it is here; it becomes the most recently used."""
        adapter = self._adapters.get(revision)
        if adapter is not None:
            self._adapters.move_to_end(revision)
        return adapter

    def rank_pages(self, revision: str) -> int | None:
        """Pages of the device's pool that it needs; None if it is not here."""
        adapter = self._adapters.get(revision)
        return None if adapter is None else rank_pages(adapter)

    def want(self, absent: Sequence[str], needed: Collection[str]) -> None:
        """Start to read the first of `absent`, unless a read is under way or the `needed` ones fill the budget."""
        if not absent or self._reading is not None:
            return
        held = sum(a.spec.nbytes for r, a in self._adapters.items() if r in needed)
        if held >= self._budget:
            return
        self._reading = absent[0]
        self._start_read(absent[0])

    def reading(self, revision: str) -> bool:
        """A read of it is under way."""
        return self._reading == revision

    def receive(self, read: AdapterRead, needed: Collection[str]) -> None:
        """A read has ended; the least recently used that nobody needs make room for what came."""
        self._reading = None
        if isinstance(read.result, Exception):
            return
        self._adapters[read.revision] = read.result
        for revision in [r for r in self._adapters if r not in needed and r != read.revision]:
            if self.nbytes <= self._budget:
                break
            del self._adapters[revision]

    def forget(self, revision: str) -> None:
        """Hold it no longer."""
        self._adapters.pop(revision, None)


def rank_pages(adapter: LoraAdapter) -> int:
    """Pages of RANK_PAGE rank rows for the adapter's largest rank."""
    return -(-adapter.spec.rank // RANK_PAGE)
