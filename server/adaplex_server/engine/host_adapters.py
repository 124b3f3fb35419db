"""Adapter images in host memory, read by a thread so that no step waits for a disk.

Owns the cache, bounded in bytes, and what is being read. A few revisions are read ahead; what rows or loads wait for
is not evicted, and a read waits until such ones leave room, so that the bound holds under any traffic (but for the
adapters that are being read).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from adaplex_server.model.adapter_image import AdapterImage

log = logging.getLogger("adaplex.engine")
_READS = 2
"""Reads asked for at once, so that the thread goes on while the engine makes a step."""


@dataclass(frozen=True)
class AdapterRead:
    """A read has ended: with the adapter, or with what went wrong. seconds: that it took."""

    revision: str
    result: AdapterImage | Exception
    seconds: float = 0.0


class Source(Protocol):
    """See `adapter_source.AdapterSource`. Every method is called in one thread."""

    def load(self, revision: str) -> AdapterImage: ...
    def keep(self, image: AdapterImage) -> None: ...
    def forget(self, revision: str) -> None: ...


class Reads(Protocol):
    """Has revisions read; each result comes back through `HostAdapters.receive`."""

    def start(self, revision: str) -> None: ...
    def forget(self, revision: str) -> None: ...


class AdapterReader:
    """The thread. deliver: called in the thread with each result (any exception of the source is one)."""

    def __init__(self, source: Source, deliver: Callable[[AdapterRead], None]) -> None:
        self._source = source
        self._deliver = deliver
        self._asked: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="adapter-reader", daemon=True).start()

    def start(self, revision: str) -> None:
        """Have the revision read."""
        self._asked.put(lambda: self._read(revision))

    def forget(self, revision: str) -> None:
        """The revision is dropped: after the reads that were asked for before, nothing of it stays."""
        self._asked.put(lambda: self._source.forget(revision))

    def _run(self) -> None:
        while True:
            try:
                self._asked.get()()
            except Exception:  # of the files beside the store: the next adapter must still be read
                log.exception("an adapter could not be kept on disk")

    def _read(self, revision: str) -> None:
        began = time.monotonic()
        try:
            result: AdapterImage | Exception = self._source.load(revision)
        except Exception as error:
            result = error
        self._deliver(AdapterRead(revision, result, time.monotonic() - began))
        if isinstance(result, AdapterImage):
            self._source.keep(result)


class HostAdapters:
    """budget: bytes."""

    def __init__(self, budget: int, reads: Reads) -> None:
        self.nbytes = 0
        self._budget = budget
        self._reads = reads
        self._images: OrderedDict[str, AdapterImage] = OrderedDict()
        self._reading: set[str] = set()

    def get(self, revision: str) -> AdapterImage | None:
        """The adapter, if it is here; it becomes the most recently used."""
        image = self._images.get(revision)
        if image is not None:
            self._images.move_to_end(revision)
        return image

    def rank_pages(self, revision: str) -> int | None:
        """Pages of the device's pool that it needs; None if it is not here."""
        image = self._images.get(revision)
        return None if image is None else len(image.pages)

    def want(self, absent: Sequence[str], needed: Collection[str]) -> None:
        """Start to read the first of `absent`, while few reads are under way and the `needed` ones leave room."""
        asked = [revision for revision in absent if revision not in self._reading]
        held = sum(image.nbytes for revision, image in self._images.items() if revision in needed)
        for revision in asked[: _READS - len(self._reading)]:
            if held >= self._budget:
                return
            self._reading.add(revision)
            self._reads.start(revision)

    def reading(self, revision: str) -> bool:
        """A read of it is under way."""
        return revision in self._reading

    def receive(self, read: AdapterRead, needed: Collection[str]) -> None:
        """A read has ended; the least recently used that nobody needs make room for what came."""
        self._reading.discard(read.revision)
        if isinstance(read.result, Exception):
            return
        self._remove(read.revision)
        self._images[read.revision] = read.result
        self.nbytes += read.result.nbytes
        if self.nbytes > self._budget:
            for revision in [r for r in self._images if r not in needed and r != read.revision]:
                self._remove(revision)
                if self.nbytes <= self._budget:
                    break

    def forget(self, revision: str) -> None:
        """Hold it no longer, here or on disk."""
        self._remove(revision)
        self._reads.forget(revision)

    def _remove(self, revision: str) -> None:
        image = self._images.pop(revision, None)
        self.nbytes -= 0 if image is None else image.nbytes
