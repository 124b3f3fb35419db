"""The KV pages that rows hold: given when a row begins, one more as it grows, known prefixes first, all given back.

Owns nothing of its own: which page is free or cached is the `PrefixCache`'s, and a row's `pages`, `computed`,
`settled`, `digests` and `kept_pages` are the row's. Pages that a launched step writes go by way of `Leaving`. Who gets
pages is the `Scheduler`'s decision, and who gives them up for others the `BegunRows`'.
"""

from __future__ import annotations

from adaplex_server.engine.leaving import Leaving
from adaplex_server.engine.prefix_cache import PrefixCache
from adaplex_server.engine.row import Row


class RowPages:
    """page_size: tokens of a page."""

    def __init__(self, cache: PrefixCache, leaving: Leaving, page_size: int) -> None:
        self._cache = cache
        self._leaving = leaving
        self._size = page_size

    @property
    def available(self) -> int:
        """Pages that can be had now."""
        return self._cache.available

    def begin(self, row: Row, spare: int) -> bool:
        """Pages for all that the row has to compute, if `spare` pages are left then; else nothing has changed."""
        total = len(row.tokens)
        found: list[int] = []
        if self._cache.enabled and not row.scoring:
            full = (total - 1) // self._size  # never the last token: its logits are wanted
            self._cache.extend_digests(row.digests, row.revision, row.tokens, full, row.tenant)
            found = self._cache.match(row.digests[:full])
        needed = -(-total // self._size) - len(found)
        if self._cache.available < needed + min(spare, self._cache.available // 8 + 1):
            self._cache.give_back(found)
            return False
        row.pages = found + self._cache.take(needed)
        row.computed = row.settled = len(found) * self._size
        return True

    def full(self, row: Row) -> bool:
        """The row's next token needs another page."""
        return row.computed >= len(row.pages) * self._size

    def extend(self, row: Row) -> None:
        """One more page, which must be available."""
        row.pages.extend(self._cache.take(1))

    def keep(self, row: Row) -> None:
        """Offer the pages that settled steps have filled to the prefix cache."""
        full = row.settled // self._size
        if not self._cache.enabled or full == row.kept_pages:
            return
        self._cache.extend_digests(row.digests, row.revision, row.tokens, full, row.tenant)
        for i in range(row.kept_pages, full):
            self._cache.insert(row.digests[i], row.revision, row.pages[i])
        row.kept_pages = full

    def release(self, row: Row) -> None:
        """The row lets go of all its pages; what they held is to be computed again."""
        settled = row.settled // self._size if row.unsettled else len(row.pages)
        if row.unsettled:
            self._leaving.hold_pages(row, row.pages[settled:])
        self._cache.give_back(row.pages[:settled])
        row.pages = []
        row.kept_pages = 0

    def condemn(self, row: Row) -> None:
        """What the row's pages hold must reach nobody: its numbers are not finite."""
        self._cache.condemn(row.pages)

    def check(self, row: Row) -> None:
        """A running row has the pages that it needs, any other has none."""
        if row.state == "running":
            room = len(row.pages) * self._size
            assert row.settled <= row.computed <= room <= row.length + self._size, "a row has too few or many pages"
        else:
            assert not row.pages and not row.computed, "a row that does not run holds pages"
