"""Pages: held by counts, never twice free, zeroed after a failed row; and the audit sees each kind of damage."""

from __future__ import annotations

import pytest

from adaplex_server.engine.page_pool import PagePool


def test_pages_come_back_when_the_last_holder_lets_go() -> None:
    pool = PagePool(5)
    pages = pool.take(4)
    assert sorted(pages) == [1, 2, 3, 4] and pool.free == 0
    pool.hold(pages[0])
    pool.release(pages[0])
    assert pool.free == 0
    pool.release(pages[0])
    assert pool.free == 1 and pool.take(1) == [pages[0]]
    pool.check_integrity([pages])


def test_misuse_raises_at_once() -> None:
    pool = PagePool(3)
    (page,) = pool.take(1)
    pool.release(page)
    with pytest.raises(RuntimeError, match="freed twice"):
        pool.release(page)
    with pytest.raises(RuntimeError, match="held by nobody"):
        pool.hold(page)
    with pytest.raises(RuntimeError, match="3 pages taken while 2 are free"):
        pool.take(3)
    with pytest.raises(RuntimeError, match="freed twice"):
        pool.release(0)
    with pytest.raises(ValueError, match="page 0"):
        PagePool(1)


def test_tainted_pages_are_dirty_before_they_are_free() -> None:
    pool = PagePool(4)
    pages = pool.take(2)
    pool.hold(pages[1])
    pool.taint(pages)
    for page in pages:
        pool.release(page)
    assert pool.dirty() == [pages[0]] and pool.free == 1
    pool.check_integrity([[pages[1]]])
    pool.release(pages[1])
    assert sorted(pool.dirty()) == sorted(pages)
    pool.cleaned()
    assert pool.free == 3 and not pool.dirty()
    pool.check_integrity([])


@pytest.mark.parametrize("damage", ["lost", "twice", "uncounted", "zero"])
def test_the_audit_sees_damage(damage: str) -> None:
    pool = PagePool(4)
    held = pool.take(2)
    if damage == "lost":
        pool._free.pop()
    elif damage == "twice":
        pool._free.append(held[0])
    elif damage == "uncounted":
        held = held[:1]
    else:
        held = [*held, 0]
    with pytest.raises(AssertionError):
        pool.check_integrity([held])
