"""The CPU path of paged attention against the reference, on the batches that traffic makes."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

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


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.7, 0.3, 0.01])
SCORES: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "alibi": {"slopes": SLOPES},
    "both": {"softcap": 2.0, "slopes": SLOPES},
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("window", [None, 5, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES.keys())
def test_equals_the_reference(
    shapes: list[tuple[int, int]], window: int | None, dtype: torch.dtype, score: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    q, keys, values, table = make(shapes, window, dtype)
    rows = rows_of(shapes, table, window)
    ours = attention(q, keys, values, rows, 0.3, window, **score)
    theirs = reference(q, keys, values, rows, 0.3, window, **score)
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


def test_scores_are_those_of_transformers() -> None:
    """Gemma 2's soft cap, and BLOOM's ALiBi, which counts from the first key."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    torch.manual_seed(2)
    count, scale = 150, 0.4
    q, keys, values, table = make([(count, count)], None, torch.float32)
    rows = rows_of([(count, count)], table, None)
    query = q.transpose(0, 1)[None]
    k, v = (pages[table[0].long()].flatten(0, 1)[:count].transpose(0, 1)[None] for pages in (keys, values))
    mask = torch.full((count, count), -torch.inf).triu(1)
    module = SimpleNamespace(num_key_value_groups=HEADS // KV, training=False)
    shared = {"dropout": 0.0, "scaling": scale}
    capped, _ = eager_attention_forward(module, query, k, v, mask, softcap=3.0, **shared)
    ours = attention(q, keys, values, rows, scale, None, softcap=3.0)
    torch.testing.assert_close(ours, capped[0].flatten(1), rtol=1e-5, atol=1e-5)

    alibi = build_alibi_tensor(torch.ones(1, count), HEADS, torch.float32)
    slopes = alibi[:, 0, 1].contiguous()
    biased, _ = eager_attention_forward(module, query, k, v, alibi + mask, **shared)
    ours = attention(q, keys, values, rows, scale, None, slopes=slopes)
    torch.testing.assert_close(ours, biased[0].flatten(1), rtol=1e-4, atol=1e-5)
