"""Feeding and choosing tokens: the reference's answers, whatever is equal or not finite."""

from __future__ import annotations

import pytest
import torch

from adaplex_server.kernels.feed import feed_tokens, likeliest
from adaplex_server.kernels.gpu import feed as gpu


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_only_rows_with_a_source_are_fed(device: torch.device, rows: int) -> None:
    tokens, chosen = torch.randint(0, 999, (rows,)), torch.randint(0, 999, (40,))
    sources = torch.randint(-1, 40, (rows,), dtype=torch.int32)
    on_device = tokens.to(device)
    gpu.feed_tokens(on_device, sources.to(device), chosen.to(device))
    feed_tokens(tokens, sources, chosen)
    assert torch.equal(on_device.cpu(), tokens)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 7), (3, 8192), (9, 20011)])
def test_the_likeliest_token_of_each_row(device: torch.device, rows: int, vocab: int) -> None:
    logits = torch.randn(rows, vocab)
    logits[0, [vocab - 1, vocab // 2]] = logits.max() + 1  # the lower of two equals
    wrong: list[int] = []
    if rows > 2:
        logits[1, vocab - 2], logits[2, 0] = torch.nan, torch.inf
        wrong = [1, 2]
    outputs = [torch.full((rows, vocab), 5.0), torch.full((rows,), 7), torch.full((rows,), 7)]
    ours = [one.to(device) for one in outputs]
    gpu.likeliest(logits.to(device), ours[0], ours[1], ours[2])
    likeliest(logits, outputs[0], outputs[1], outputs[2])
    assert torch.equal(ours[0].cpu().nan_to_num(9), logits.nan_to_num(9)) and torch.equal(ours[1].cpu(), outputs[1])
    assert [row for row in range(rows) if ours[1][row] < 0] == wrong
    fine = [row for row in range(rows) if row not in wrong]
    assert torch.equal(ours[2].cpu()[fine], outputs[2][fine])
    assert all(0 <= token < vocab for token in (*ours[2].tolist(), *outputs[2].tolist()))
