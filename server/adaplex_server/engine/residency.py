"""The life of each adapter revision in the engine: read, brought to the device, proved, dropped.

Owns the calls that wait for an answer, the copies under way, the proofs, and which revisions are refused. A proof
belongs to the content and so to the revision: it is made when the revision first reaches the device, and holds as long
as the process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from adaplex_adapters.errors import AdaplexError, InternalError, InvalidAdapter, ModelNotFound
from adaplex_server.engine.adapter_slots import AdapterSlots, Reservation
from adaplex_server.engine.host_adapters import AdapterRead, HostAdapters
from adaplex_server.engine.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterLoaded,
    AdapterMoved,
    DropAdapter,
    LoadAdapter,
)
from adaplex_server.engine.placement import Placement
from adaplex_server.engine.prefix_cache import PrefixCache
from adaplex_server.engine.scheduler import Scheduler
from adaplex_server.model.adapter_image import RANK_PAGE, AdapterImage, pages_of_rank


class AdapterDevice(Protocol):
    """Where adapters are written to. `write` begins to copy an adapter to its slot, `landed` tells whether that has
    ended, `wait` returns when it has. `prove` runs the probe in a slot and returns the largest absolute difference of
    its logits from the base's; it and `write` raise InvalidAdapter.
    """

    def write(self, slot: int, pages: tuple[int, ...], image: AdapterImage) -> None: ...
    def landed(self, slot: int) -> bool: ...
    def wait(self, slot: int) -> None: ...
    def prove(self, slot: int) -> float: ...
    def clear(self, slot: int) -> None: ...
    def page_bytes(self) -> int: ...


@dataclass(frozen=True)
class _Call:
    call: int
    began: float


@dataclass(frozen=True)
class _Copy:
    """To a slot, under way."""

    reservation: Reservation
    began: float


class Residency:
    """send: a message to the API process."""

    def __init__(
        self,
        scheduler: Scheduler,
        placement: Placement,
        slots: AdapterSlots,
        hosts: HostAdapters,
        cache: PrefixCache,
        device: AdapterDevice,
        send: Callable[[msgspec.Struct], None],
    ) -> None:
        self.loads = 0
        self._scheduler = scheduler
        self._placement = placement
        self._slots = slots
        self._hosts = hosts
        self._cache = cache
        self._device = device
        self._send = send
        self._proofs: dict[str, float] = {}
        self._arriving: dict[str, _Copy] = {}
        self._loading: dict[str, list[_Call]] = {}
        self._dropping: dict[str, list[int]] = {}
        self._dropped: set[str] = set()

    @property
    def host_bytes(self) -> int:
        """Of the adapters in host memory."""
        return self._hosts.nbytes

    def refusal(self, revision: str | None) -> AdaplexError | None:
        """Why no row of this revision may be queued, if it may not."""
        if revision in self._dropped:
            return ModelNotFound("this adapter has been unloaded; load it again to use it")
        return None

    def load(self, message: LoadAdapter, now: float) -> None:
        """Have the revision read and proved. A drop that has not been carried out is given up: it is wanted again."""
        revision = message.revision
        self._dropped.discard(revision)
        for call in self._dropping.pop(revision, []):
            self._send(AdapterDropped(call, revision, 0))
        self._loading.setdefault(revision, []).append(_Call(message.call, now))
        if revision in self._proofs and self._slots.usable(revision):
            self._answer(revision, now)
        else:
            self._placement.claim(revision, self._scheduler.next_order())

    def drop(self, message: DropAdapter) -> None:
        """Refuse new rows of the revision from now on; `settle_drops` forgets it when its last row has ended."""
        self._dropped.add(message.revision)
        self._dropping.setdefault(message.revision, []).append(message.call)

    def settle_drops(self) -> None:
        """Carry out the drops of revisions that nothing uses any more."""
        for revision in list(self._dropping):
            busy = self._placement.claimed(revision) or self._hosts.reading(revision) or revision in self._arriving
            if not busy and not self._scheduler.rows_of(revision) and not self._slots.pinned(revision):
                freed = self._forget(revision)
                for call in self._dropping.pop(revision):
                    self._send(AdapterDropped(call, revision, freed))

    def fetch(self) -> None:
        """Have the most urgent absent revision read."""
        absent = self._scheduler.absent()
        if absent:
            self._hosts.want(absent, self._scheduler.wanted())

    def receive(self, read: AdapterRead) -> None:
        """A read has ended."""
        self._hosts.receive(read, self._scheduler.wanted())
        if isinstance(read.result, Exception):
            error = read.result
            self._fail(read.revision, error if isinstance(error, AdaplexError) else InternalError(repr(error)))
            return
        self._send(AdapterMoved(read.revision, "read", read.seconds))
        too_large = self._too_large(read.result)
        if too_large is not None:
            self._fail(read.revision, InvalidAdapter(too_large))

    def _too_large(self, image: AdapterImage) -> str | None:
        """Why the image fits no slot, if it does not."""
        most, room = self._slots.pages_per_slot, self._slots.total_pages
        limit = f"up to {most * RANK_PAGE} (max_rank, adapter_bytes)"
        if pages_of_rank(image.rank) > most:
            return f"rank {image.rank} does not fit: this server takes ranks {limit}"
        if image.bottleneck_pages - 1 > most:
            return f"its bottlenecks do not fit: this server takes widths {limit}"
        if len(image.pages) > room:
            return f"it takes {len(image.pages)} pages of adapter memory, and this server has {room} (adapter_bytes)"
        return None

    def place(self, clock: Callable[[], float]) -> bool:
        """Begin to bring at most one adapter to its slot, and settle those that have come. True while any is under way,
        or was settled now.

        A copy is waited for only where no row runs, so that no step is held up.
        """
        reservation = self._scheduler.place()
        if reservation is not None:
            self._begin(reservation, clock())
        if self._arriving and not self._scheduler.running:
            self._device.wait(next(iter(self._arriving.values())).reservation.slot.index)
        came = [one for one in self._arriving.values() if self._device.landed(one.reservation.slot.index)]
        for one in came:
            self._settle(one, clock)
        return reservation is not None or bool(came or self._arriving)

    def _begin(self, reservation: Reservation, now: float) -> None:
        revision, slot = reservation.revision, reservation.slot
        image = self._hosts.get(revision)
        assert image is not None, "a slot was reserved for an adapter that is not in host memory"
        try:
            self._device.write(slot.index, slot.pages, image)
        except AdaplexError as error:
            self._refuse(reservation, error)
        else:
            self._arriving[revision] = _Copy(reservation, now)

    def _settle(self, copy: _Copy, clock: Callable[[], float]) -> None:
        """All of it is on the device: prove it, unless that was done before, and let its rows begin."""
        reservation, revision = copy.reservation, copy.reservation.revision
        del self._arriving[revision]
        self.loads += 1
        self._send(AdapterMoved(revision, "copy", clock() - copy.began))
        try:
            if revision not in self._proofs:
                self._proofs[revision] = self._device.prove(reservation.slot.index)
        except AdaplexError as error:
            self._refuse(reservation, error)
            return
        self._slots.arrive(revision)
        self._answer(revision, clock())

    def _refuse(self, reservation: Reservation, error: AdaplexError) -> None:
        self._slots.remove(reservation.revision)
        self._device.clear(reservation.slot.index)
        self._fail(reservation.revision, error)

    def _answer(self, revision: str, now: float) -> None:
        self._placement.settle(revision)
        slot = self._slots.slot(revision)
        size = len(slot.pages) * self._device.page_bytes() if slot is not None else 0
        for call in self._loading.pop(revision, []):
            self._send(AdapterLoaded(call.call, revision, self._proofs[revision], size, now - call.began))

    def _fail(self, revision: str, error: AdaplexError) -> None:
        self._placement.settle(revision)
        self._scheduler.fail_revision(revision, error)
        self._forget(revision)
        for call in self._loading.pop(revision, []):
            self._send(AdapterFailed(call.call, revision, type(error).__name__, error.message))

    def _forget(self, revision: str) -> int:
        """Nothing of the revision stays; returns the bytes of device memory that are free again."""
        freed = 0
        slot = self._slots.slot(revision)
        if slot is not None and not self._slots.pinned(revision):
            self._slots.remove(revision)
            self._device.clear(slot.index)
            freed = len(slot.pages) * self._device.page_bytes()
        self._hosts.forget(revision)
        self._cache.drop_revision(revision)
        self._proofs.pop(revision, None)
        return freed
