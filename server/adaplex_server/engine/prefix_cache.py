"""Full KV pages that are kept after their row, to be shared by rows that begin with the same tokens.

A page is known by a digest over (revision, all tokens up to the page's end), so the same prefix under another adapter
is another page, and a name reloaded with other weights can never meet a stale one. Nor do tenants meet: who could find
a page of another one would learn from the time that it takes what that one has asked. Owns which pages the cache holds;
the count of holders is the `PagePool`'s.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from adaplex_server.engine.page_pool import PagePool


def root_digest(revision: str | None, tenant: str = "") -> bytes:
    """Where every chain of a revision (None: the base) and a tenant begins."""
    of = b"base" if revision is None else b"adapter:" + revision.encode()
    return blake2b(of, digest_size=16, key=blake2b(tenant.encode(), digest_size=16).digest()).digest()


def next_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a page that holds `tokens` after the page `parent`."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class _Entry:
    digest: bytes
    revision: str | None


class PrefixCache:
    """Holds each of its pages once; a page that no row holds beside it is idle and may be evicted, oldest first."""

    def __init__(self, pool: PagePool, page_size: int, enabled: bool = True) -> None:
        self.enabled = enabled
        self._pool = pool
        self._page_size = page_size
        self._page_of: dict[bytes, int] = {}
        self._entry_of: dict[int, _Entry] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._revisions: dict[str | None, set[int]] = {}

    def __len__(self) -> int:
        return len(self._entry_of)

    @property
    def available(self) -> int:
        """Pages that can be had: free ones, and idle ones after eviction."""
        return self._pool.free + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that only the cache holds."""
        return len(self._idle)

    def pages(self) -> list[int]:
        """Every page that the cache holds (for the audit)."""
        return list(self._entry_of)

    def extend_digests(
        self, digests: list[bytes], revision: str | None, tokens: Sequence[int], pages: int, tenant: str = ""
    ) -> None:
        """Make `digests` cover the first `pages` full pages of `tokens`."""
        size = self._page_size
        while len(digests) < pages:
            at = len(digests)
            parent = digests[-1] if digests else root_digest(revision, tenant)
            digests.append(next_digest(parent, tokens[at * size : (at + 1) * size]))

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning; the caller holds them from now on."""
        found: list[int] = []
        for digest in digests if self.enabled else ():
            page = self._page_of.get(digest)
            if page is None:
                break
            self._pool.hold(page)
            self._idle.pop(page, None)
            found.append(page)
        return found

    def take(self, count: int) -> list[int]:
        """`count` pages for a row, evicting idle ones where too few are free (see `available`)."""
        while self._pool.free < count:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        return self._pool.take(count)

    def insert(self, digest: bytes, revision: str | None, page: int) -> None:
        """Keep a full page that a row holds. A digest that is known already keeps its first page."""
        if not self.enabled or digest in self._page_of:
            return
        self._pool.hold(page)
        self._page_of[digest] = page
        self._entry_of[page] = _Entry(digest, revision)
        self._revisions.setdefault(revision, set()).add(page)

    def give_back(self, pages: Sequence[int]) -> None:
        """A row lets go of its pages. Last page first, so that the end of a chain is evicted before its beginning."""
        for page in reversed(pages):
            self._pool.release(page)
            if page in self._entry_of and self._pool.holders(page) == 1:
                self._idle[page] = None

    def condemn(self, pages: Sequence[int]) -> None:
        """Keep none of these any longer: their row failed, and they must be zeroed before anybody gets them."""
        self._discard(pages)
        self._pool.taint(pages)

    def _discard(self, pages: Sequence[int]) -> None:
        for page in pages:
            if page in self._entry_of:
                self._idle.pop(page, None)
                self._forget(page)

    def drop_revision(self, revision: str | None) -> int:
        """Forget every page of a revision; returns how many."""
        pages = list(self._revisions.get(revision, ()))
        self._discard(pages)
        return len(pages)

    def _forget(self, page: int) -> None:
        entry = self._entry_of.pop(page)
        del self._page_of[entry.digest]
        siblings = self._revisions[entry.revision]
        siblings.discard(page)
        if not siblings:
            del self._revisions[entry.revision]
        self._pool.release(page)

    def check_integrity(self) -> None:
        """Both directions of the map agree, and idle means that only the cache holds the page."""
        assert {e.digest: p for p, e in self._entry_of.items()} == self._page_of, "digests and pages disagree"
        idle = {p for p in self._entry_of if self._pool.holders(p) == 1}
        assert idle == set(self._idle), f"idle pages are {sorted(idle)}, listed {sorted(self._idle)}"
        assert {p for s in self._revisions.values() for p in s} == set(self._entry_of), "a page has no revision"
