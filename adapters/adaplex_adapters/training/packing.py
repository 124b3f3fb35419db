"""Putting several short examples into one row, so that little of a batch is padding. Pure."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.encoding import IGNORED, EncodedExample

_POSITION_FREE = ("bloom", "mpt", "opt", "mamba", "falcon")
"""Model types that derive positions from the attention mask or the place in the row, which packing changes."""


def check_packable(model_type: str, window: int | None, length: int) -> None:
    """Raise InvalidRequest for a base on which a packed example would not be what it is alone."""
    if model_type in _POSITION_FREE:
        raise InvalidRequest(f"packing is not possible on a {model_type} base; leave it out", param="packing")
    if window is not None and window < length:
        raise InvalidRequest(
            f"packing needs max_length of at most the base's attention window, {window}, not {length}", param="packing"
        )


def pack(examples: Sequence[EncodedExample], length: int, seed: int) -> list[EncodedExample]:
    """Rows of at most `length` tokens; each example is whole, in exactly one of them. Best fit over a random order."""
    rows: list[list[EncodedExample]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for example in random.Random(f"packing/{seed}").sample(list(examples), len(examples)):
        needed = len(example.ids)
        at = bisect.bisect_left(room, (needed, -1))
        if at == len(room):
            room_left, row = length, len(rows)
            rows.append([])
        else:
            room_left, row = room.pop(at)
        rows[row].append(example)
        bisect.insort(room, (room_left - needed, row))
    return [_joined(row) for row in rows]


def _joined(row: list[EncodedExample]) -> EncodedExample:
    """The first token of an example follows nothing of its own, so it is never learned."""
    ids = tuple(token for example in row for token in example.ids)
    labels = tuple(label for example in row for label in (IGNORED, *example.labels[1:]))
    return EncodedExample(row[0].line, ids, labels, tuple(len(example.ids) for example in row))
