"""Tiles hold every adapted token once, one slot each, and nothing of the base."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from adaplex_server.kernels import lora_tiles as tiling
from adaplex_server.kernels.lora_tiles import lora_tiles

CPU = torch.device("cpu")


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(-1, 4)), max_size=12), st.booleans())
def test_every_adapted_token_lies_in_one_tile_of_its_slot(rows: list[tuple[int, int]], many: bool) -> None:
    limit, tiling._MANY_TOKENS = tiling._MANY_TOKENS, 0 if many else tiling._MANY_TOKENS
    try:
        tiles = lora_tiles([row[0] for row in rows], [row[1] for row in rows], lambda slot: slot + 1, CPU)
    finally:
        tiling._MANY_TOKENS = limit
    slots = [slot for count, slot in rows for _ in range(count)]
    adapted = [token for token, slot in enumerate(slots) if slot >= 0]
    if not adapted:
        assert tiles is None
        return
    assert tiles is not None
    assert sorted(tiles.order.tolist()) == adapted
    seen = []
    for begin, count, slot in tiles.tiles.tolist():
        assert 0 < count <= tiles.tile_tokens
        tokens = tiles.order[begin : begin + count].tolist()
        assert {slots[token] for token in tokens} == {slot}
        seen += tokens
    assert sorted(seen) == adapted
    assert tiles.max_pages == max(slots) + 1
    assert tiles.order.dtype == tiles.tiles.dtype == torch.int32
