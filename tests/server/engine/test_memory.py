"""Sizes follow the settings, stay inside what is free, and too little is told with figures."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaplex_adapters.errors import StartupError
from adaplex_server.engine.memory import MemoryPlan, ModelBytes, plan_memory
from adaplex_server.engine.settings import EngineSettings

MODEL = ModelBytes(max_context=2048, kv_page=360_000, adapter_page=4_900_000, step=100 << 20)
GIB = 1 << 30


def plan(free: int, on_gpu: bool = False, **changes: Any) -> MemoryPlan:
    return plan_memory(EngineSettings(base="", store="", base_name="", **changes), MODEL, free, on_gpu, 8)


def test_a_machine_with_room_serves_the_whole_context() -> None:
    found = plan(16 * GIB)
    assert found.max_context == 2048 and found.probe_pages == 1 and found.pages_per_slot == 32
    assert found.kv_pages * MODEL.kv_page <= GIB + MODEL.kv_page
    wide = plan(80 * GIB, on_gpu=True)
    assert wide.kv_pages - 1 == 64 * 128, "no more than every row can use"


def test_explicit_sizes_are_obeyed() -> None:
    found = plan(4 * GIB, kv_bytes=360_000 * 200, adapter_bytes=4_900_000 * 3, max_context=512, max_rank=64)
    assert found == MemoryPlan(201, 1, 4, 3, 512)
    assert plan(4 * GIB, max_slots=0).adapter_pages == 1


@pytest.mark.parametrize(
    ("free", "changes", "words"),
    [
        (110 << 20, {}, "raise kv_bytes, lower max_context"),
        (8 * GIB, {"kv_bytes": 9 * GIB}, "do not fit"),
        (8 * GIB, {"kv_bytes": 360_000 * 10, "max_context": 1024}, "1024 tokens need"),
        (8 * GIB, {"adapter_bytes": 1000}, "raise adapter_bytes"),
        (0, {}, "free memory"),
    ],
)
def test_too_little_is_refused(free: int, changes: dict[str, int], words: str) -> None:
    with pytest.raises(StartupError, match=words):
        plan(free, **changes)


@given(st.integers(0, 64 * GIB), st.booleans())
def test_never_more_than_is_free(free: int, on_gpu: bool) -> None:
    try:
        found = plan(free, on_gpu)
    except StartupError:
        return
    taken = (found.kv_pages - 1) * MODEL.kv_page + (found.adapter_pages - 1) * MODEL.adapter_page
    assert taken + MODEL.step <= free
    assert (found.kv_pages - 1 - found.probe_pages) * 16 >= found.max_context >= 256
    assert 1 <= found.pages_per_slot <= found.adapter_pages - 1
