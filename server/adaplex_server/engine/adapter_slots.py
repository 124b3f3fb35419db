"""Which adapter revision lies in which slot and rank pages of the device's `AdapterPool`.

Owns slot and page numbers and the pins; the weights are written by whoever reserved. A revision is pinned once for
each row that has begun with it; unpinned ones make room, least recently used first. One that is still being copied
has its place, but neither do rows begin with it nor does it make room. Slots are keyed by revision, never by name, so
the same content under two names takes one slot.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """A revision's place: index into the pool's slots, and its rank pages in rank order."""

    index: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Reservation:
    """A slot that is now the revision's and must be written, and the revisions that made room for it."""

    revision: str
    slot: Slot
    evicted: tuple[str, ...]


class AdapterSlots:
    """`pages` counts page 0 too, which is nobody's; `pages_per_slot` bounds one adapter."""

    def __init__(self, slots: int, pages: int, pages_per_slot: int) -> None:
        self.total_slots = slots
        self.total_pages = pages - 1
        self.pages_per_slot = min(pages_per_slot, pages - 1)
        self.evictions = 0
        self._free_slots = list(range(slots - 1, -1, -1))
        self._free_pages = list(range(pages - 1, 0, -1))
        self._resident: OrderedDict[str, Slot] = OrderedDict()
        self._pins: dict[str, int] = {}
        self._arriving: set[str] = set()

    def __len__(self) -> int:
        return len(self._resident)

    @property
    def used_pages(self) -> int:
        """Rank pages that a resident revision holds."""
        return self.total_pages - len(self._free_pages)

    def slot(self, revision: str) -> Slot | None:
        """Where the revision lies or is being copied to, None if it is neither."""
        return self._resident.get(revision)

    def usable(self, revision: str) -> bool:
        """It is on the device, whole."""
        return revision in self._resident and revision not in self._arriving

    def arrive(self, revision: str) -> None:
        """All of it has been copied to its place."""
        self._arriving.remove(revision)

    def pinned(self, revision: str) -> int:
        """How many rows hold it in its place."""
        return self._pins.get(revision, 0)

    def pin(self, revision: str) -> int:
        """A row begins with it: it keeps its place until `unpin`, and is now the most recently used. Its slot index."""
        self._resident.move_to_end(revision)
        self._pins[revision] = self._pins.get(revision, 0) + 1
        return self._resident[revision].index

    def unpin(self, revision: str) -> None:
        """The row has ended."""
        count = self._pins.get(revision, 0)
        if count < 1:
            raise RuntimeError(f"adapter {revision[:12]} is unpinned twice")
        if count == 1:
            del self._pins[revision]
        else:
            self._pins[revision] = count - 1

    def reserve(self, revision: str, pages: int, keep: Collection[str] = ()) -> Reservation | None:
        """A slot with `pages` rank pages, evicting unpinned revisions outside `keep`; None, and nothing changed, if
        that is not enough. The revision is not usable before `arrive`.
        """
        if revision in self._resident:
            raise RuntimeError(f"adapter {revision[:12]} is resident already")
        victims = self._victims(pages, [r for r in self._settled() if r not in self._pins and r not in keep])
        if victims is None:
            return None
        for victim in victims:
            self.remove(victim)
            self.evictions += 1
        slot = Slot(self._free_slots.pop(), tuple(self._free_pages.pop() for _ in range(pages)))
        self._resident[revision] = slot
        self._arriving.add(revision)
        return Reservation(revision, slot, tuple(victims))

    def blockers(self, pages: int) -> list[str] | None:
        """The revisions that would have to go, pinned or not, for `pages` rank pages: least recently used first."""
        return self._victims(pages, self._settled())

    def _settled(self) -> list[str]:
        return [revision for revision in self._resident if revision not in self._arriving]

    def _victims(self, pages: int, candidates: list[str]) -> list[str] | None:
        slots, room, victims = len(self._free_slots), len(self._free_pages), []
        for revision in candidates:
            if slots and room >= pages:
                break
            victims.append(revision)
            slots, room = slots + 1, room + len(self._resident[revision].pages)
        return victims if slots and room >= pages else None

    def remove(self, revision: str) -> Slot:
        """Forget an unpinned revision; its slot and pages are free."""
        if revision in self._pins:
            raise RuntimeError(f"adapter {revision[:12]} is pinned by {self._pins[revision]} rows")
        slot = self._resident.pop(revision)
        self._arriving.discard(revision)
        self._free_slots.append(slot.index)
        self._free_pages.extend(slot.pages)
        return slot

    def check_integrity(self) -> None:
        """Every slot and page is free or one revision's, and only residents are pinned."""
        slots = sorted((*self._free_slots, *(s.index for s in self._resident.values())))
        assert slots == list(range(self.total_slots)), "a slot is lost or given twice"
        pages = sorted((*self._free_pages, *(p for s in self._resident.values() for p in s.pages)))
        assert pages == list(range(1, self.total_pages + 1)), "a rank page is lost or given twice"
        assert self._pins.keys() | self._arriving <= self._resident.keys(), "an absent revision is pinned or arriving"
        assert not self._pins.keys() & self._arriving, "a row has begun with a revision that is still being copied"
        assert all(count > 0 for count in self._pins.values()), "a pin counts nothing"
