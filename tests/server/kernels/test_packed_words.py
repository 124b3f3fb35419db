"""Codes in the words of GPTQ and AWQ, against streams of bits written one at a time."""

from __future__ import annotations

import pytest
import torch

from adaplex_server.kernels.packed_words import plus_one, unpack_awq, unpack_words


def _stream(codes: list[int], bits: int) -> list[int]:
    """int32 words of one line."""
    whole = sum(code << (bits * index) for index, code in enumerate(codes))
    words = [(whole >> (32 * index)) & 0xFFFFFFFF for index in range(len(codes) * bits // 32)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_codes_are_a_stream_of_bits(bits: int, dim: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, 64), generator=torch.Generator().manual_seed(bits))
    words = torch.tensor([_stream(line, bits) for line in codes.tolist()], dtype=torch.int32)
    if dim == 0:
        codes, words = codes.t(), words.t().contiguous()
    assert torch.equal(unpack_words(words, bits, dim), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_one_taken_from_whole_words_comes_back(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (9, 32), generator=torch.Generator().manual_seed(bits))
    codes[0] = 0
    words = torch.tensor([_stream(line, bits) for line in codes.tolist()], dtype=torch.int32)
    ones = torch.tensor(_stream([1] * (32 // bits), bits), dtype=torch.int32)
    assert torch.equal(plus_one(words - ones, bits), words)


def test_awq_order() -> None:
    """The order in which AutoAWQ packs: the word's nibbles hold columns 0, 2, 4, 6, 1, 3, 5, 7."""
    codes = torch.randint(0, 16, (3, 24), generator=torch.Generator().manual_seed(0))
    words = [
        [_stream([line[begin + place] for place in (0, 2, 4, 6, 1, 3, 5, 7)], 4)[0] for begin in range(0, 24, 8)]
        for line in codes.tolist()
    ]
    assert torch.equal(unpack_awq(torch.tensor(words, dtype=torch.int32)), codes.to(torch.uint8))
