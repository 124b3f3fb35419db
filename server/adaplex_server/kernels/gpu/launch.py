"""What all launches share: whether Triton interprets (CPU tests), programmatic dependent launch, and block sizes."""

from __future__ import annotations

from functools import cache

import torch
import triton

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


@cache
def dependent_launch() -> bool:
    """Whether a kernel may begin before its predecessor has ended (programmatic dependent launch, compute capability
    9.0).

    A kernel launched so must call `gdc_wait` in every program before it reads what another kernel wrote, writes, or
    returns: until then only what no kernel of a step writes may be read (weights, adapters, the step's inputs).
    The one exception is `kernels.gpu.shrink`, which reads what the product in front of it reads: a kernel that
    multiplies with the base's weights lets its successor begin only when its own input is there.
    """
    return not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def dependent() -> dict[str, bool]:
    """Launch options of a kernel that keeps to the rule of `dependent_launch`; PDL is its own constant."""
    return {"PDL": True, "launch_pdl": True} if dependent_launch() else {"PDL": False}


def unfused() -> dict[str, bool]:
    """Launch options of a kernel whose products and sums the compiler must not fuse as it likes, since variants of it
    have to give the same bits.
    """
    return {"enable_fp_fusion": False}


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)
