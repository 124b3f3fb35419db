"""Slots and rank pages: pins hold, the least recently used goes first, nothing is lost."""

from __future__ import annotations

import random

import pytest

from adaplex_server.engine.adapter_slots import AdapterSlots


def filled(slots: AdapterSlots, revisions: str, pages: int) -> AdapterSlots:
    for revision in revisions:
        assert slots.reserve(revision, pages) is not None
        slots.arrive(revision)
    return slots


def test_pinned_and_kept_ones_stay() -> None:
    slots = filled(AdapterSlots(3, 10, 9), "abc", 2)
    slots.pin("a")
    found = slots.reserve("d", 2, keep={"b"})
    assert found is not None and found.evicted == ("c",)
    assert slots.reserve("e", 2, keep={"b", "d"}) is None
    slots.arrive("d")
    assert slots.blockers(8) == ["b", "a", "d"] and slots.blockers(10) is None
    slots.check_integrity()


def test_large_ones_evict_as_many_as_needed() -> None:
    slots = AdapterSlots(4, 7, 9)
    assert slots.pages_per_slot == 6
    filled(slots, "abc", 2)
    found = slots.reserve("d", 3)
    assert found is not None and found.evicted == ("a", "b") and len(set(found.slot.pages)) == 3
    assert slots.used_pages == 5 and slots.evictions == 2


def test_what_is_being_copied_neither_serves_nor_makes_room() -> None:
    slots = filled(AdapterSlots(2, 5, 4), "a", 2)
    assert slots.reserve("b", 2) is not None
    assert slots.slot("b") is not None and not slots.usable("b") and slots.usable("a")
    assert slots.blockers(4) is None and slots.blockers(2) == ["a"]
    found = slots.reserve("c", 2)
    assert found is not None and found.evicted == ("a",) and slots.reserve("d", 1) is None
    slots.check_integrity()
    slots.remove("b")
    slots.arrive("c")
    assert slots.usable("c") and slots.reserve("d", 2) is not None
    slots.check_integrity()


def test_misuse_raises() -> None:
    slots = filled(AdapterSlots(1, 3, 2), "a", 1)
    with pytest.raises(RuntimeError, match="resident already"):
        slots.reserve("a", 1)
    with pytest.raises(RuntimeError, match="unpinned twice"):
        slots.unpin("a")
    slots.pin("a")
    with pytest.raises(RuntimeError, match="pinned by 1"):
        slots.remove("a")


def test_random_use_keeps_integrity() -> None:
    rng = random.Random(0)
    slots, pins = AdapterSlots(3, 9, 4), []
    for _ in range(3000):
        revision = f"r{rng.randrange(8)}"
        if slots.slot(revision) is None:
            slots.reserve(revision, 1 + int(revision[1:]) % 4)
        elif not slots.usable(revision):
            slots.arrive(revision)
        elif rng.random() < 0.4:
            pins.append(revision)
            slots.pin(revision)
        if pins and rng.random() < 0.5:
            slots.unpin(pins.pop(rng.randrange(len(pins))))
        assert all(slots.slot(r) is not None for r in pins)
        slots.check_integrity()


@pytest.mark.parametrize("damage", ["slot", "page", "pin"])
def test_the_audit_sees_damage(damage: str) -> None:
    slots = filled(AdapterSlots(2, 5, 4), "a", 2)
    if damage == "slot":
        slots._free_slots.clear()
    elif damage == "page":
        slots._free_pages.append(4)
    else:
        slots._pins["ghost"] = 1
    with pytest.raises(AssertionError):
        slots.check_integrity()
