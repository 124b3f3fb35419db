"""Which adapter is brought to the device next, and who has to stand back for it.

Rows of resident adapters are never held up by rows that wait for a slot, until one has waited for `patience` steps:
then no new row of the least recently used adapters begins, so that their pins run out and the place comes free.
Owns the claims and the waits; slots are the `AdapterSlots`'.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from adaplex_server.engine.adapter_slots import AdapterSlots, Reservation

Order = tuple[int, int]


class Placement:
    """pages_of: rank pages of a revision that is in host memory, None if it must be read first."""

    def __init__(self, slots: AdapterSlots, pages_of: Callable[[str], int | None], patience: int = 16) -> None:
        self._slots = slots
        self._pages_of = pages_of
        self._patience = patience
        self._claims: dict[str, Order] = {}
        self._blocked: dict[str, int] = {}
        self._yielding: frozenset[str] = frozenset()

    def claim(self, revision: str, order: Order) -> None:
        """A load wants the revision on the device, rows or no rows."""
        self._claims.setdefault(revision, order)

    def settle(self, revision: str) -> None:
        """The claim is answered, or given up."""
        self._claims.pop(revision, None)

    def claimed(self, revision: str) -> bool:
        """A load of it is under way."""
        return revision in self._claims

    def may_begin(self, revision: str | None) -> bool:
        """Rows of this revision may begin now."""
        if revision is None:
            return True
        return self._slots.usable(revision) and revision not in self._yielding

    def wanted(self, waiting: Mapping[str, Order]) -> list[str]:
        """Revisions wanted on the device that are neither there nor on their way, in the order of their first row or
        claim.

        waiting: revision -> the order of its first waiting row.
        """
        first = dict(self._claims)
        for revision, order in waiting.items():
            first[revision] = min(order, first.get(revision, order))
        return sorted((r for r in first if self._slots.slot(r) is None), key=first.__getitem__)

    def absent(self, waiting: Mapping[str, Order]) -> list[str]:
        """Revisions that must be read into host memory, most urgent first."""
        return [r for r in self.wanted(waiting) if self._pages_of(r) is None]

    def place(self, waiting: Mapping[str, Order], room: bool) -> Reservation | None:
        """The one reservation of this step, if any. Without `room` for a row, rows that wait still find their adapters
        on the device later, but none stands back for them.
        """
        wanted = [(r, pages) for r in self.wanted(waiting) if (pages := self._pages_of(r)) is not None]
        self._blocked = {r: self._blocked.get(r, 0) for r, _ in wanted}
        starving = next(((r, p) for r, p in wanted if self._blocked[r] >= self._patience), None)
        self._yielding = frozenset(self._slots.blockers(starving[1]) or ()) if starving else frozenset()
        for revision, pages in [starving] if starving else wanted:
            reservation = self._slots.reserve(revision, pages, keep=() if starving else self._kept(waiting))
            if reservation is not None:
                del self._blocked[revision]
                self._yielding = frozenset()
                return reservation
            self._blocked[revision] += room or revision in self._claims
        return None

    def _kept(self, waiting: Collection[str]) -> set[str]:
        """Resident ones that waiting rows or claims are about to use: evicting them would only bring them back."""
        return {*waiting, *self._claims}
