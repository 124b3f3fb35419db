"""The rotary frequencies and tables of a model.

Frequency i of `dim` rotating dimensions is theta^(-2i / dim), i < dim / 2 (RoFormer, Su et al. 2021). Kind "linear"
divides all by the factor (position interpolation, Chen et al. 2023). Kind "llama3" (Llama 3.1) divides those whose
wavelength is beyond original_context / low_freq_factor, keeps those below original_context / high_freq_factor, and
blends in between. Kind "yarn" (Peng et al. 2023) keeps those that turn more than beta_fast times within
original_context, divides those that turn less than beta_slow times, and blends linearly in i in between. Kind
"longrope" (Ding et al. 2024) divides each by a factor of its own.
"""

from __future__ import annotations

import math

import torch

from adaplex_server.model.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, longest: int) -> torch.Tensor:
    """[dim / 2] float32, radians a position. longest: the longest context that is to be served."""
    if rope.kind == "none":
        return torch.zeros(rope.dim // 2)
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim))
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_context * frequencies / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / rope.factor
    if rope.kind == "yarn":
        kept = 1 - _yarn_ramp(rope)
        return kept * frequencies + (1 - kept) * frequencies / rope.factor
    if rope.kind == "longrope":
        # One choice for all rows and positions: keys in the cache are turned already, and no row's answer may depend
        # on how long another one has become.
        factors = rope.long_factors if longest > rope.original_context else rope.short_factors
        return frequencies / torch.tensor(factors)
    return frequencies


def _yarn_ramp(rope: RopeConfig) -> torch.Tensor:
    """[dim / 2]: 0 where a frequency is kept, 1 where it is divided."""

    def dimension(turns: float) -> float:
        """Where a frequency turns so often within the original context."""
        wavelength = rope.original_context / (turns * 2 * math.pi)
        return rope.dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low if high != low else 0.001
    return ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


def rotary_tables(rope: RopeConfig, positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position's angles times the attention factor, [positions, dim / 2] float32."""
    frequencies = inverse_frequencies(rope, positions)
    angles = torch.arange(positions, dtype=torch.float32).unsqueeze(1) * frequencies
    return (angles.cos() * rope.attention_factor).to(device), (angles.sin() * rope.attention_factor).to(device)
