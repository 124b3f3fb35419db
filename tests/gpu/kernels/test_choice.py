"""The random choice on the GPU against the CPU's: the same token, or the one beside it where u is at their border."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from adaplex_server.kernels import choice
from adaplex_server.kernels.gpu import choice as gpu

_ROUNDING = 2e-6


def random_wish(rng: random.Random) -> list[float]:
    top_k = rng.choice([0, 0, 1, 3, 50, 700, 10**6])
    top_p = rng.choice([1.0, 1.0, 0.95, 0.4, 0.01])
    return [rng.choice([0.05, 0.3, 1.0, 1.7, 30.0]), rng.random(), top_k, top_p, rng.choice([0.0, 0.0, 0.05, 0.3, 1.0])]


@pytest.mark.parametrize("vocab", [3, 600, 5003])
@pytest.mark.parametrize("ties", [False, True])
def test_the_token_of_the_cpu(device: torch.device, vocab: int, ties: bool) -> None:
    rng = random.Random(torch.initial_seed())
    wishes = np.array([random_wish(rng) for _ in range(9)])
    logits = torch.randn(9, vocab) * 3
    if ties:
        logits = (logits * 2).round() / 2
    logits[:, rng.randrange(vocab)] = -torch.inf
    found = gpu.choose(logits.to(device), torch.from_numpy(wishes).to(device)).cpu()
    wanted = choice.choose(logits, wishes)
    for i in (found != wanted).nonzero()[:, 0].tolist():
        near = np.repeat(wishes[i : i + 1], 4, axis=0)
        near[:2, 1] += (-_ROUNDING, _ROUNDING)
        near[2:, 3] *= (1 - _ROUNDING, 1 + _ROUNDING)
        assert found[i] in choice.choose(logits[i].expand(4, -1), near), (wishes[i], found[i], wanted[i])


def test_a_row_is_chosen_for_alone_and_whatever_its_neighbours_are(device: torch.device) -> None:
    rng = random.Random(torch.initial_seed())
    wishes = torch.tensor([random_wish(rng) for _ in range(7)], dtype=torch.float64, device=device)
    logits = torch.randn(7, 3001, device=device) * 4
    logits[2] = torch.nan
    logits[4, 9] = torch.inf
    together = gpu.choose(logits, wishes)
    assert ((together >= 0) & (together < 3001)).all()
    for row in range(7):
        assert gpu.choose(logits[row : row + 1], wishes[row : row + 1].contiguous()) == together[row]
