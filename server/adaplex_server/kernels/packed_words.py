"""Codes of two to eight bits in the int32 words of GPTQ and AWQ checkpoints.

GPTQ: the codes of neighbours along a dimension are one stream of bits, the first code and its lowest bit first; a code
of three bits may lie in two words. AWQ: eight 4-bit codes of neighbouring out-features in each word, in the order 0, 2,
4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

import torch

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack_words(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """words: a matrix of int32 whose codes of `bits` (2, 3, 4 or 8) lie side by side along `dim`. Returns uint8."""
    lines = words.transpose(0, 1) if dim == 0 else words
    if bits == 3:
        codes = _three_bits(lines)
    else:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        codes = (lines.unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1).to(torch.uint8).flatten(1)
    return codes.transpose(0, 1) if dim == 0 else codes


def _three_bits(lines: torch.Tensor) -> torch.Tensor:
    """Thirty-two codes from every three words of each line."""
    wide = lines.to(torch.int64) & 0xFFFFFFFF
    low, middle, high = wide.unflatten(1, (-1, 3)).unbind(2)
    parts = []
    for index in range(32):
        word, shift = divmod(3 * index, 32)
        first = (low, middle, high)[word] >> shift
        if shift > 29:
            first = first | ((low, middle, high)[word + 1] << (32 - shift))
        parts.append(first & 7)
    return torch.stack(parts, 2).to(torch.uint8).flatten(1)


def plus_one(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Words of zeros from which one was taken each, restored; for bits that divide 32.

    The one was subtracted from whole words, with borrows between the codes: added to whole words it brings them all
    back.
    """
    ones = sum(1 << shift for shift in range(0, 32, bits))
    whole = (words.to(torch.int64) + ones) & 0xFFFFFFFF
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """words: [rows, N / 8] int32 as AWQ's GEMM kernels have them. Returns [rows, N] uint8."""
    codes = unpack_words(words, 4, 1).unflatten(1, (-1, 8))
    return codes[:, :, _AWQ_PLACES].flatten(1)
