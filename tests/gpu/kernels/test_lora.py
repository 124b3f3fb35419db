"""LoRA deltas of mixed batches against each token computed alone, in float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch

from adaplex_server.kernels import lora_tiles as tiling
from adaplex_server.kernels.gpu.lora import add_lora
from support.lora_pool import RANK_PAGE, RANKS, Pool, pool, tiles_of

SHAPES = (
    (40, ((0, 24), (24, 32), (32, 40))),
    (1100, ((0, 150),)),
    (64, ((0, 530), (530, 600))),
)
if os.environ.get("TRITON_INTERPRET") == "1":
    SHAPES = SHAPES[:2]
# Rows as (tokens, slot).
BATCHES = {
    "distinct": [(1, 0), (1, 1), (1, 2), (1, 3), (1, -1), (1, 5)],
    "identical": [(1, 2)] * 18,
    "skewed": [(1, 3), (20, 0), (1, 1), (2, -1), (70, 2), (1, 3), (1, 0)],
    "one base row": [(1, -1)],
    "an adapter without rank": [(3, 4), (1, 1)],
}


def add(pool: Pool, y: torch.Tensor, x: torch.Tensor, rows: list[tuple[int, int]]) -> torch.Tensor:
    """A new tensor: y with the deltas."""
    out = y.clone()
    tiles = tiles_of(rows, y.device)
    if tiles is not None:
        where = (tiles.order, tiles.tiles, tiles.tile_tokens, tiles.max_pages)
        parts = (pool.a, pool.b, pool.scaling, pool.slot_pages, pool.slot_page_count, pool.spans)
        add_lora(out, x, *parts, *where, RANK_PAGE)
    return out


@pytest.mark.parametrize(("k", "spans"), SHAPES)
@pytest.mark.parametrize("large_tiles", [False, True])
def test_mixed_batches(
    k: int,
    spans: tuple[tuple[int, int], ...],
    large_tiles: bool,
    dtype: torch.dtype,
    device: torch.device,
    check: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = pool(k, spans, dtype, device)
    if large_tiles:
        monkeypatch.setattr(tiling, "_MANY_TOKENS", 0)
    for name, rows in BATCHES.items():
        if large_tiles and name != "skewed":
            continue
        starts = [0, *accumulate(count for count, _ in rows)]
        x = torch.randn(starts[-1], k, dtype=dtype, device=device)
        y = torch.randn(starts[-1], spans[-1][1], dtype=dtype, device=device)
        got = add(made, y, x, rows)
        expected = y.double()
        for (_, slot), begin, end in zip(rows, starts, starts[1:], strict=False):
            if slot >= 0:
                expected[begin:end] += made.delta(x[begin:end], slot)
        check(got, expected, factor=2)
        for at, row in enumerate(rows):
            own = slice(starts[at], starts[at + 1])
            if row[1] < 0 or RANKS[row[1]] == 0:
                assert torch.equal(got[own], y[own])
        at = len(rows) // 2
        own = slice(starts[at], starts[at + 1])
        assert torch.equal(add(made, y[own], x[own], rows[at : at + 1]), got[own]), (
            "a row's bits depend on its neighbours"
        )


def test_a_row_of_nan_stays_alone(dtype: torch.dtype, device: torch.device) -> None:
    made = pool(64, ((0, 96),), dtype, device)
    rows = [(1, 2)] * 5 + [(1, 0)]
    x, y = torch.randn(6, 64, dtype=dtype, device=device), torch.randn(6, 96, dtype=dtype, device=device)
    clean = add(made, y, x, rows)
    x[1] = float("nan")
    dirty = add(made, y, x, rows)
    others = [0, 2, 3, 4, 5]
    assert torch.equal(dirty[others], clean[others])
    assert dirty[1].isnan().all()
