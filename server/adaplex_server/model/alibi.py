"""The slopes of ALiBi: how much each head's scores fall with distance."""

from __future__ import annotations

import torch


def alibi_slopes(heads: int) -> torch.Tensor:
    """[heads] float32 (Press et al. 2022).

    With P the largest power of two that is not above `heads`: 2^(-8 i / P), i = 1..P, and for heads beyond P every
    second slope of 2 P heads.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-8.0 * i / (2 * power)) for i in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes)
