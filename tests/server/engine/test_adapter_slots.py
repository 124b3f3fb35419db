"""Slots and rank pages: pins hold, the least recently used goes first, nothing is lost."""

from __future__ import annotations

import random

import pytest

from adaplex_server.engine.adapter_slots import AdapterSlots


def test_pinned_and_kept_ones_stay() -> None:
    slots = AdapterSlots(3, 10, 9)
    for revision in "abc":
        assert slots.reserve(revision, 2) is not None
    slots.pin("a")
    found = slots.reserve("d", 2, keep={"b"})
    assert found is not None and found.evicted == ("c",)
    assert slots.reserve("e", 2, keep={"b", "d"}) is None
    assert slots.blockers(8) == ["b", "a", "d"] and slots.blockers(10) is None
    slots.check_integrity()


def test_large_ones_evict_as_many_as_needed() -> None:
    slots = AdapterSlots(4, 7, 9)
    assert slots.pages_per_slot == 6
    for revision in "abc":
        slots.reserve(revision, 2)
    found = slots.reserve("d", 3)
    assert found is not None and found.evicted == ("a", "b") and len(set(found.slot.pages)) == 3
    assert slots.used_pages == 5 and slots.evictions == 2


def test_misuse_raises() -> None:
    slots = AdapterSlots(1, 3, 2)
    slots.reserve("a", 1)
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
        elif rng.random() < 0.4:
            pins.append(revision)
            slots.pin(revision)
        if pins and rng.random() < 0.5:
            slots.unpin(pins.pop(rng.randrange(len(pins))))
        assert all(slots.slot(r) is not None for r in pins)
        slots.check_integrity()


@pytest.mark.parametrize("damage", ["slot", "page", "pin"])
def test_the_audit_sees_damage(damage: str) -> None:
    slots = AdapterSlots(2, 5, 4)
    slots.reserve("a", 2)
    if damage == "slot":
        slots._free_slots.clear()
    elif damage == "page":
        slots._free_pages.append(4)
    else:
        slots._pins["ghost"] = 1
    with pytest.raises(AssertionError):
        slots.check_integrity()
