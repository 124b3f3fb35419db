"""Which tokens of a step belong to which adapter slot, in tiles that a GPU kernel takes one at a time. Built on the
host, once a step.

Tokens of one slot are gathered although their rows lie apart, so that a tile reads its adapter once. The base's tokens
have tiles too, of the slot NO_SLOT, as kernels that go on with a linear's output go by tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

FEW_TOKENS = 128
NO_SLOT = -1
FEW_TILE = 4
SMALL_TILE = 16
LARGE_TILE = 64


@dataclass(frozen=True)
class LoraTiles:
    """order: [T'] int32, the tokens in tiles, grouped by slot. tiles: [tiles, 3] int32, (begin in order, tokens, slot);
    tokens 0 for an unused tile.

    tile_tokens: the most tokens of one tile. max_pages: the most rank pages of any slot in tiles. slots: [T] int32, of
    each token, negative for none; None in a step of more than FEW_TOKENS.
    """

    order: torch.Tensor
    tiles: torch.Tensor
    tile_tokens: int
    max_pages: int
    slots: torch.Tensor | None = None


def lora_tiles(
    row_tokens: Sequence[int], row_slots: Sequence[int], pages_of: Callable[[int], int], device: torch.device
) -> LoraTiles | None:
    """Tiles of a step whose rows have these tokens and slots (negative: no adapter); None when no row has an adapter.

    pages_of: how many rank pages a slot has.
    """
    tokens = np.repeat(np.asarray(row_slots, dtype=np.int64), row_tokens)
    adapted = {slot for slot, count in zip(row_slots, row_tokens, strict=True) if slot >= 0 and count}
    if not adapted:
        return None
    few = len(tokens) <= FEW_TOKENS
    tile_tokens = LARGE_TILE
    if few:
        tile_tokens = FEW_TILE if tile_count(tokens, FEW_TILE) < len(tokens) else 1
    order, tiles = _gather(tokens, tile_tokens)
    # One copy to the device for all.
    packed = torch.from_numpy(np.concatenate((order, tiles.ravel(), tokens if few else tokens[:0])).astype(np.int32))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    parts = packed.split((len(order), tiles.size, len(tokens) if few else 0))
    return LoraTiles(
        order=parts[0],
        tiles=parts[1].view(-1, 3),
        tile_tokens=tile_tokens,
        max_pages=max(pages_of(slot) for slot in adapted),
        slots=parts[2] if few else None,
    )


def tile_count(token_slots: Sequence[int] | NDArray[np.int64], tile_tokens: int) -> int:
    """How many tiles these tokens need."""
    _, counts = np.unique(np.asarray(token_slots), return_counts=True)
    return int((-(-counts // tile_tokens)).sum())


def decode_tiles(row_slots: Sequence[int], tile_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order [rows] and tiles [tiles, 3] (as in `LoraTiles`) of a step whose rows have one token each."""
    return _gather(np.asarray(row_slots, dtype=np.int64), tile_tokens)


def _gather(token_slots: NDArray[np.int64], tile_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tokens' order by slot, and the tiles."""
    order = np.argsort(token_slots, kind="stable")
    slots = token_slots[order]
    starts = np.flatnonzero(np.diff(slots, prepend=NO_SLOT - 1))
    lengths = np.diff(starts, append=len(slots))
    counts = -(-lengths // tile_tokens)
    # Each tile's number among those of its slot.
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.repeat(starts, counts) + number * tile_tokens
    taken = np.minimum(np.repeat(lengths, counts) - number * tile_tokens, tile_tokens)
    return order, np.stack((begin, taken, np.repeat(slots[starts], counts)), axis=1)
