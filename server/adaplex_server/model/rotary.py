"""The rotary frequencies and tables of a model.

Frequency i of `dim` rotating dimensions is theta^(-2i / dim), i < dim / 2 (RoFormer, Su et al. 2021). Kind "linear"
divides all by the factor (position interpolation, Chen et al. 2023). Kind "llama3" (Llama 3.1) divides those whose
wavelength is beyond original_context / low_freq_factor, keeps those below original_context / high_freq_factor, and
blends in between.
"""

from __future__ import annotations

import math

import torch

from adaplex_server.model.config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> torch.Tensor:
    """[dim / 2] float32, radians a position."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim))
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_context * frequencies / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / rope.factor
    return frequencies


def rotary_tables(rope: RopeConfig, positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position's angles, [positions, dim / 2] float32."""
    angles = torch.arange(positions, dtype=torch.float32).unsqueeze(1) * inverse_frequencies(rope)
    return angles.cos().to(device), angles.sin().to(device)
