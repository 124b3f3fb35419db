"""The layout of 4-bit weights for the CUDA kernels, against its own description."""

from __future__ import annotations

import pytest
import torch

from adaplex_server.kernels.cuda import layout4


@pytest.mark.parametrize(("n", "k", "blocks"), [(64, 128, 1), (70, 200, 2), (130, 576, 4), (8, 32, 1)])
def test_words_come_back(n: int, k: int, blocks: int) -> None:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    words = layout4.pack_words(codes, blocks)
    assert words.shape == (-(-k // 128), blocks, 1024)
    assert torch.equal(layout4.unpack_words(words, n, k), codes)


def test_many_outputs_are_packed_piece_by_piece() -> None:
    codes = torch.randint(0, 16, (4096 + 192, 128), dtype=torch.uint8)
    words = layout4.pack_words(codes, 67)
    assert torch.equal(words[:, 64:], layout4.pack_words(codes[4096:], 3))


def test_a_thread_finds_its_operands_of_the_tensor_core() -> None:
    """Register 2 * h + r of a thread's fragment holds k = 2 q + 8 h and the next, of output 16 w + g + 8 r."""
    codes = torch.randint(0, 16, (128, 256), dtype=torch.uint8)
    words = layout4.pack_words(codes, 2).view(2, 2, 2, 128, 4)
    for step, block, half, thread, c in ((0, 0, 0, 0, 0), (1, 1, 1, 127, 3), (1, 0, 1, 77, 2), (0, 1, 0, 38, 1)):
        word = int(words[step, block, half, thread, c]) & 0xFFFFFFFF
        w, g, q = thread // 32, thread % 32 // 4, thread % 4
        for h in range(2):
            for r in range(2):
                byte = (word >> (8 * (2 * h + r))) & 255
                row = codes[64 * block + 16 * w + g + 8 * r]
                k = 128 * step + 64 * half + 16 * c + 8 * h + 2 * q
                assert (byte & 15, byte >> 4) == (int(row[k]), int(row[k + 1]))


@pytest.mark.parametrize("group", [32, 64, 128, 256, 512])
def test_scales_lie_where_a_step_looks(group: int) -> None:
    k, n = 512, 100
    values = torch.arange(n * (k // group), dtype=torch.float32).view(n, -1)
    laid = layout4.pack_groups(values, k, group, 2)
    span = max(1, group // 128)
    for n_, k_ in ((0, 0), (99, 511), (9, 130), (71, 300)):
        step, block, row = k_ // 128, n_ // 64, n_ % 64
        w, r, g = row // 16, row % 16 // 8, row % 8
        inside = k_ % 128 // group if group < 128 else 0
        assert laid[step // span, block, inside, 16 * w + 2 * g + r] == values[n_, k_ // group]
    assert laid.count_nonzero() == values.count_nonzero()  # zero where the weight is padded


@pytest.mark.parametrize(
    ("k", "group", "fitting"),
    [(4096, 128, True), (576, 64, True), (576, 576, True), (576, 4096, True), (4096, 96, False), (100, 32, False)],
)
def test_what_fits(k: int, group: int, fitting: bool) -> None:
    assert layout4.fits(k, group) is fitting
