"""What rows have let go of while a launched step still uses it: the KV pages that it writes, the adapter that it reads.

Invariant: a page that a launched step writes, and a slot that one reads, is held until that step is settled, whatever
has become of the row: ended, cancelled, preempted. So whoever gets a page or a slot may write it at once and on any
stream, and a row whose numbers turn out not to be finite has its last page zeroed like the others.

Owns those pages and pins from the row's release to the settling of its last launched step. With nothing in flight it
is empty.
"""

from __future__ import annotations

from adaplex_server.engine.adapter_slots import AdapterSlots
from adaplex_server.engine.prefix_cache import PrefixCache
from adaplex_server.engine.row import Row


class Leaving:
    """Gives back to the cache and the slots."""

    def __init__(self, cache: PrefixCache, slots: AdapterSlots) -> None:
        self._cache = cache
        self._slots = slots
        self._pages: dict[Row, list[int]] = {}
        self._pinning: set[Row] = set()

    @property
    def pages(self) -> list[list[int]]:
        """The pages held here (for the audit)."""
        return list(self._pages.values())

    def pins(self, revision: str) -> int:
        """The pins held here (for the audit)."""
        return sum(row.revision == revision for row in self._pinning)

    def hold_pages(self, row: Row, pages: list[int]) -> None:
        """These, which launched steps write, are the row's no longer."""
        if pages:
            assert row.unsettled and row not in self._pages
            self._pages[row] = pages

    def unpin(self, row: Row) -> None:
        """The row has ended: its slot is unpinned, now or when no launched step reads it any more."""
        assert row.revision is not None
        if row.unsettled:
            self._pinning.add(row)
        else:
            self._slots.unpin(row.revision)

    def settle(self, row: Row, failed: bool) -> None:
        """One of the row's steps is settled, and its outcome is nobody's. failed: its numbers are not finite."""
        if failed:
            self._cache.condemn(self._pages.get(row, []))
        if row.unsettled:
            return
        self._cache.give_back(self._pages.pop(row, []))
        if row in self._pinning and row.revision is not None:
            self._pinning.remove(row)
            self._slots.unpin(row.revision)

    def check_integrity(self) -> None:
        """Whatever is held here is used by a launched step."""
        assert all(row.unsettled for row in (*self._pages, *self._pinning)), "a settled step holds a page or a slot"
