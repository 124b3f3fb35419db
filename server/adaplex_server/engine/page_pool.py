"""Who holds which KV page. Owns the numbers of pages, never their contents.

A page is free, dirty (given back by a row that failed; must be zeroed before it is free), or held: by the rows that
read or write it and by the prefix cache, each counted once. Page 0 is never given out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class PagePool:
    """`pages` counts page 0 too, as the KvCache does."""

    def __init__(self, pages: int) -> None:
        if pages < 2:
            raise ValueError(f"a pool of {pages} pages has none to give out: page 0 belongs to nobody")
        self.total = pages - 1
        self._free = list(range(pages - 1, 0, -1))
        self._holders = [0] * pages
        self._tainted: set[int] = set()
        self._dirty: list[int] = []

    @property
    def free(self) -> int:
        """Pages that can be taken now."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many rows and caches hold this page."""
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """`count` free pages, each with one holder. Taking more than are free is a bug of the caller."""
        if count > len(self._free):
            raise RuntimeError(f"{count} pages taken while {len(self._free)} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def hold(self, page: int) -> None:
        """One holder more of a page that is held already."""
        if self._holders[page] < 1:
            raise RuntimeError(f"page {page} is held by nobody and cannot be shared")
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One holder less; the last one frees the page. Raises on a page that nobody holds (a double free)."""
        if self._holders[page] < 1:
            raise RuntimeError(f"page {page} is freed twice")
        self._holders[page] -= 1
        if self._holders[page] > 0:
            return
        if page in self._tainted:
            self._tainted.discard(page)
            self._dirty.append(page)
        else:
            self._free.append(page)

    def taint(self, pages: Iterable[int]) -> None:
        """These may hold numbers that are not finite: once nobody holds them they are dirty, not free."""
        self._tainted.update(page for page in pages if self._holders[page] > 0)

    def dirty(self) -> list[int]:
        """Pages to be zeroed before they can be free again."""
        return list(self._dirty)

    def cleaned(self) -> None:
        """The pages told by `dirty` have been zeroed."""
        self._free.extend(self._dirty)
        self._dirty.clear()

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """`held`: the pages of each holder (rows, cache, probe). Every page has exactly those holders, or is free."""
        counted = Counter(page for pages in held for page in pages)
        assert counted[0] == 0 and self._holders[0] == 0, "page 0 is held"
        wrong = [p for p, count in enumerate(self._holders) if counted[p] != count]
        assert not wrong, f"pages {wrong[:8]} are held by {[counted[p] for p in wrong[:8]]} and not as counted"
        idle = sorted((*self._free, *self._dirty, *(p for p in counted if p)))
        assert idle == list(range(1, self.total + 1)), "a page is lost, or both free and held"
        assert all(self._holders[p] for p in self._tainted), "a tainted page is held by nobody"
