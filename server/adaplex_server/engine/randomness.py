"""A row's random numbers: a function of its seed and of how many tokens it has generated, and of nothing else.

So a row's text does not depend on who shares the batch, on the chunks of its prefill, or on having been preempted.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    """The output function of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) with 53 random bits, for the token `index` (from 0) of a row with this seed (any integer)."""
    start = _mix((seed + _GOLDEN) & _MASK)
    return (_mix((start + (index + 1) * _GOLDEN) & _MASK) >> 11) * 2.0**-53
