"""How many tokens of prompts a step takes, where few tokens cost little and a larger step has a high cost of its own.

On a GPU a step of few tokens is replayed as one graph; any other is launched kernel by kernel, which takes the host as
long as many replays. Prompts that are short enough are therefore read in pieces beside the rows that decode, and those
are never held up for long; a burst or a long prompt is read in one large step, whose cost it is worth.
"""

from __future__ import annotations

from collections.abc import Iterable

_BESIDE, _ALONE = 8, 3
"""Replays with prompts, beside rows that decode and alone, that cost no more than a large step. On an H200 with 8B
parameters a large one takes 30 to 45 ms, a replay of 128 rows 9 ms, of which the 64 that decode would take 5.
"""
_LEAST = 16
"""Tokens of prompts that are worth a step."""


def prompt_share(few: int, decoding: int, budget: int, prompts: Iterable[int]) -> int:
    """Tokens of prompts in the next step, of a `budget`. few: tokens of a cheap step; decoding: rows that take one
    each; prompts: tokens that are still to be computed.
    """
    room = min(few - decoding, budget)
    if room < _LEAST:
        return budget
    most = room * (_BESIDE if decoding else _ALONE)
    total = 0
    for tokens in prompts:
        total += tokens
        if total > most:
            return budget
    return room
