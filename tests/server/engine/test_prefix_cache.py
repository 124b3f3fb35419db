"""The prefix cache: keyed by content and revision, evicted from the end of idle chains, never from rows."""

from __future__ import annotations

from adaplex_server.engine.page_pool import PagePool
from adaplex_server.engine.prefix_cache import PrefixCache, next_digest, root_digest


def fill(cache: PrefixCache, revision: str | None, tokens: list[int]) -> tuple[list[bytes], list[int]]:
    """A row that computes these tokens (pages of 2) and keeps its pages."""
    digests: list[bytes] = []
    cache.extend_digests(digests, revision, tokens, len(tokens) // 2)
    pages = cache.take(len(digests))
    for digest, page in zip(digests, pages, strict=True):
        cache.insert(digest, revision, page)
    return digests, pages


def test_a_digest_depends_on_revision_order_and_every_token() -> None:
    seen = {root_digest(None), root_digest("a"), root_digest("base"), root_digest("")}
    seen |= {root_digest(None, "a"), root_digest("a", "b"), root_digest("b", "a"), root_digest(None, "ab")}
    seen |= {next_digest(root_digest(r), t) for r in (None, "a") for t in ([1, 2], [2, 1], [1, 3], [258, 0])}
    assert len(seen) == 16
    assert next_digest(next_digest(root_digest("a"), [1]), [2]) != next_digest(root_digest("a"), [1, 2])


def test_matches_the_longest_beginning_of_the_same_revision() -> None:
    pool = PagePool(10)
    cache = PrefixCache(pool, 2)
    digests, pages = fill(cache, "a", [1, 2, 3, 4, 5, 6])
    other: list[bytes] = []
    cache.extend_digests(other, "a", [1, 2, 3, 4, 9, 9], 3)
    assert cache.match(other) == pages[:2]
    alien: list[bytes] = []
    cache.extend_digests(alien, "b", [1, 2, 3, 4, 5, 6], 3)
    assert cache.match(alien) == [] and cache.match(digests) == pages
    for held in (pages, pages, pages[:2]):
        cache.give_back(held)
    cache.check_integrity()
    pool.check_integrity([cache.pages()])


def test_eviction_takes_the_oldest_idle_chain_from_its_end() -> None:
    pool = PagePool(6)
    cache = PrefixCache(pool, 2)
    first, old = fill(cache, None, [1, 2, 3, 4])
    second, new = fill(cache, None, [7, 7, 8, 8])
    cache.give_back(old)
    cache.give_back(new)
    assert cache.available == 5
    taken = cache.take(2)
    assert cache.match(first) == old[:1] and cache.match(second) == new
    pool.check_integrity([cache.pages(), taken, old[:1], new])
    assert cache.available == 0


def test_condemned_and_dropped_pages_are_found_no_more() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, 2)
    a, pages_a = fill(cache, "a", [1, 2, 3, 4])
    b, pages_b = fill(cache, "b", [1, 2, 3, 4])
    cache.condemn(pages_a)
    cache.give_back(pages_a)
    assert cache.match(a) == [] and sorted(pool.dirty()) == sorted(pages_a)
    assert cache.drop_revision("b") == 2 and cache.match(b) == []
    assert pool.free == 3, "a running row keeps its pages"
    cache.give_back(pages_b)
    assert pool.free == 5 and len(cache) == 0
    cache.check_integrity()


def test_a_disabled_cache_keeps_nothing() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, 2, enabled=False)
    digests, pages = fill(cache, None, [1, 2])
    cache.give_back(pages)
    assert cache.match(digests) == [] and pool.free == 3
