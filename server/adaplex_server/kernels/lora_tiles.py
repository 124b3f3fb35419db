"""Which tokens of a step belong to which adapter slot, in tiles that a GPU kernel takes one at a time. Built on the
host, once a step.

Tokens of one slot are gathered although their rows lie apart, so that a tile reads its adapter once. The base's tokens
are in no tile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

SMALL_TILE = 16
LARGE_TILE = 64
_MANY_TOKENS = 2048


@dataclass(frozen=True)
class LoraTiles:
    """order: [T'] int32, the tokens that have an adapter, grouped by slot. tiles: [tiles, 3] int32, (begin in order,
    tokens, slot).

    tile_tokens: the most tokens of one tile. max_pages: the most rank pages of any slot in tiles.
    """

    order: torch.Tensor
    tiles: torch.Tensor
    tile_tokens: int
    max_pages: int


def lora_tiles(
    row_tokens: Sequence[int], row_slots: Sequence[int], pages_of: Callable[[int], int], device: torch.device
) -> LoraTiles | None:
    """Tiles of a step whose rows have these tokens and slots (negative: no adapter); None when no row has an adapter.

    pages_of: how many rank pages a slot has.
    """
    starts = np.concatenate(([0], np.cumsum(row_tokens, dtype=np.int64)))
    spans: dict[int, list[tuple[int, int]]] = {}
    for row, slot in enumerate(row_slots):
        if slot >= 0 and row_tokens[row]:
            spans.setdefault(slot, []).append((int(starts[row]), int(starts[row + 1])))
    if not spans:
        return None
    order = np.concatenate([np.arange(begin, end) for found in spans.values() for begin, end in found])
    tile_tokens = SMALL_TILE if len(order) <= _MANY_TOKENS else LARGE_TILE
    lengths = {slot: sum(end - begin for begin, end in found) for slot, found in spans.items()}
    tiles = _cut(lengths, tile_tokens)
    # One copy to the device for both.
    packed = torch.from_numpy(np.concatenate((order, np.asarray(tiles).ravel())).astype(np.int32))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    return LoraTiles(
        order=packed[: len(order)],
        tiles=packed[len(order) :].view(-1, 3),
        tile_tokens=tile_tokens,
        max_pages=max(pages_of(slot) for slot in spans),
    )


def decode_tiles(row_slots: Sequence[int]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Order and tiles (of SMALL_TILE tokens, as in `LoraTiles`) of a step whose rows have one token each."""
    rows: dict[int, list[int]] = {}
    for row, slot in enumerate(row_slots):
        if slot >= 0:
            rows.setdefault(slot, []).append(row)
    order = [row for found in rows.values() for row in found]
    return order, _cut({slot: len(found) for slot, found in rows.items()}, SMALL_TILE)


def _cut(lengths: Mapping[int, int], tile_tokens: int) -> list[tuple[int, int, int]]:
    """lengths: slot -> tokens, which lie one slot after another."""
    tiles: list[tuple[int, int, int]] = []
    at = 0
    for slot, left in lengths.items():
        while left:
            taken = min(left, tile_tokens)
            tiles.append((at, taken, slot))
            at += taken
            left -= taken
    return tiles
