"""What all launches share: whether Triton interprets (CPU tests), and powers of two for block sizes."""

from __future__ import annotations

import triton

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)
