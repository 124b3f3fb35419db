"""Tiles hold every token once, one slot each."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from adaplex_server.kernels import lora_tiles as tiling
from adaplex_server.kernels.lora_tiles import lora_tiles

CPU = torch.device("cpu")


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(-1, 4)), max_size=12), st.booleans())
def test_every_token_lies_in_one_tile_of_its_slot(rows: list[tuple[int, int]], few: bool) -> None:
    limit, tiling.FEW_TOKENS = tiling.FEW_TOKENS, 1000 if few else 0
    try:
        tiles = lora_tiles([row[0] for row in rows], [row[1] for row in rows], lambda slot: slot + 1, CPU)
    finally:
        tiling.FEW_TOKENS = limit
    slots = [slot for count, slot in rows for _ in range(count)]
    adapted = [token for token, slot in enumerate(slots) if slot >= 0]
    if not adapted:
        assert tiles is None
        return
    assert tiles is not None
    assert sorted(tiles.order.tolist()) == list(range(len(slots)))
    assert (tiles.slots is None) != few and (tiles.slots is None or tiles.slots.tolist() == slots)
    assert len(tiles.tiles) == tiling.tile_count(slots, tiles.tile_tokens)
    seen = []
    for begin, count, slot in tiles.tiles.tolist():
        assert 0 < count <= tiles.tile_tokens
        tokens = tiles.order[begin : begin + count].tolist()
        assert {slots[token] for token in tokens} == {slot}
        seen += tokens
    assert sorted(seen) == sorted(tiles.order.tolist())
    assert tiles.max_pages == max(slots) + 1
    assert tiles.order.dtype == tiles.tiles.dtype == torch.int32
