"""The CPU path of paged attention against the reference, on the batches that traffic makes."""

from __future__ import annotations

import random

import pytest
import torch

from adaplex_server.kernels.attention import AttentionRows, attention, attention_rows, reference

PAGE, KV, HEADS, DIM = 4, 2, 6, 16


def make(shapes: list[tuple[int, int]], window: int | None, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Cache and queries of rows (tokens, context), with NaN wherever no row's own position is."""
    rng = random.Random(0)
    counts = [-(-context // PAGE) for _, context in shapes]
    pages = rng.sample(range(1, sum(counts) + 5), sum(counts))
    table = torch.zeros(len(shapes), max(counts), dtype=torch.int32)
    keys, values = (torch.full((sum(counts) + 5, PAGE, KV, DIM), torch.nan, dtype=dtype) for _ in range(2))
    keys[0] = values[0] = 0
    for row, (_, context) in enumerate(shapes):
        for i in range(counts[row]):
            page = pages.pop()
            table[row, i] = page
            filled = min(PAGE, context - i * PAGE)
            keys[page, :filled] = torch.randn(filled, KV, DIM)
            values[page, :filled] = torch.randn(filled, KV, DIM)
    q = torch.randn(sum(tokens for tokens, _ in shapes), HEADS, DIM).to(dtype)
    return q, keys, values, table


def rows_of(shapes: list[tuple[int, int]], table: torch.Tensor, window: int | None) -> AttentionRows:
    tokens, contexts = zip(*shapes, strict=True)
    starts = torch.tensor([0, *tokens]).cumsum(0).int()
    return attention_rows(
        starts, torch.tensor(contexts, dtype=torch.int32), table, tokens, contexts, PAGE, KV, HEADS, [window]
    )


SHAPES = {
    "one": [(1, 1)],
    "one page": [(1, 4), (4, 4)],
    "a page and one": [(1, 5), (5, 5)],
    "decode": [(1, 7), (1, 128), (1, 129), (1, 300), (1, 2)],
    "prefill": [(9, 9), (3, 20)],
    "mixed": [(1, 33), (8, 8), (1, 200), (2, 150), (1, 1)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("window", [None, 5, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference(shapes: list[tuple[int, int]], window: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, keys, values, table = make(shapes, window, dtype)
    rows = rows_of(shapes, table, window)
    ours = attention(q, keys, values, rows, 0.3, window)
    theirs = reference(q, keys, values, rows, 0.3, window)
    assert ours.shape == (q.shape[0], HEADS * DIM) and torch.isfinite(ours).all()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_takes_queries_as_a_view_of_the_fused_outputs() -> None:
    torch.manual_seed(1)
    shapes = SHAPES["mixed"]
    q, keys, values, table = make(shapes, None, torch.float32)
    fused = torch.cat((q, torch.randn(q.shape[0], 2 * KV, DIM)), 1)
    rows = rows_of(shapes, table, None)
    ours = attention(fused[:, :HEADS], keys, values, rows, 0.3, None)
    torch.testing.assert_close(ours, attention(q, keys, values, rows, 0.3, None))
