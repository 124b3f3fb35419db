"""How weights are cut for the CUDA kernels, and for whom the kernels are."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from adaplex_server.kernels.cuda.linear4 import choose_cut, padded_blocks, usable


@pytest.mark.parametrize(
    ("n", "k", "groups", "parts"),
    [(28672, 4096, 4, 1), (4096, 14336, 2, 4), (6144, 4096, 3, 4), (4096, 4096, 2, 4), (64, 128, 1, 1)],
)
def test_the_cut_of_a_shape(n: int, k: int, groups: int, parts: int) -> None:
    cut = choose_cut(n, k)
    assert (cut.groups, cut.parts) == (groups, parts)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 576, 1000, 5120, 27648, 151936])
@pytest.mark.parametrize("k", [32, 576, 4096, 14336])
def test_every_part_has_steps_and_every_tile_is_whole(n: int, k: int) -> None:
    cut, steps = choose_cut(n, k), -(-k // 128)
    bounds = [part * steps // cut.parts for part in range(cut.parts + 1)]
    assert all(first < last for first, last in pairwise(bounds))
    blocks = padded_blocks(n, k)
    assert blocks % cut.groups == 0
    assert n <= 64 * blocks < n + 64 * cut.groups


def test_a_cpu_takes_the_other_layout() -> None:
    assert not usable(torch.device("cpu"), torch.bfloat16, 4096, 128)
