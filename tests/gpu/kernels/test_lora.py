"""LoRA deltas of mixed batches against each token computed alone, in float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch

from adaplex_server.kernels import lora_tiles as tiling
from adaplex_server.kernels.gpu.lora import add_lora
from adaplex_server.kernels.lora_tiles import lora_tiles

RANK_PAGE = 8
RANKS = (1, 8, 24, 256, 0, 16)
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


@dataclass(frozen=True)
class Pool:
    """One linear's rank rows, as `model.adapter_pool` lays them out. Rows of a module below its page's end are zero."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor
    slot_pages: torch.Tensor
    slot_page_count: torch.Tensor
    spans: tuple[tuple[int, int], ...]

    def add(self, y: torch.Tensor, x: torch.Tensor, rows: Sequence[tuple[int, int]]) -> torch.Tensor:
        """A new tensor: y with the deltas."""
        out = y.clone()
        counts, slots = [row[0] for row in rows], [row[1] for row in rows]
        tiles = lora_tiles(counts, slots, lambda slot: -(-RANKS[slot] // RANK_PAGE), y.device)
        if tiles is not None:
            where = (tiles.order, tiles.tiles, tiles.tile_tokens, tiles.max_pages)
            parts = (self.a, self.b, self.scaling, self.slot_pages, self.slot_page_count, self.spans)
            add_lora(out, x, *parts, *where, RANK_PAGE)
        return out

    def delta(self, x: torch.Tensor, slot: int) -> torch.Tensor:
        out = torch.zeros(x.shape[0], self.b.shape[1], dtype=torch.float64, device=x.device)
        pages = self.slot_pages[slot, : int(self.slot_page_count[slot])].long()
        rows = (pages[:, None] * RANK_PAGE + torch.arange(RANK_PAGE, device=x.device)).flatten()
        for target, (begin, end) in enumerate(self.spans):
            h = x.double() @ self.a[rows, target].double().t() * self.scaling[slot, target].double()
            out[:, begin:end] = h @ self.b[rows, begin:end].double()
        return out


def pool(k: int, spans: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> Pool:
    counts = [-(-rank // RANK_PAGE) for rank in RANKS]
    total = sum(counts) + 1
    a = torch.randn(total * RANK_PAGE, len(spans), k, device=device) * k**-0.5
    b = torch.randn(total * RANK_PAGE, spans[-1][1], device=device)
    free = (torch.randperm(total - 1, device=device) + 1).tolist()
    slot_pages = torch.zeros(len(RANKS), max(counts), dtype=torch.int32, device=device)
    for slot, rank in enumerate(RANKS):
        own = [free.pop() for _ in range(counts[slot])]
        slot_pages[slot, : len(own)] = torch.tensor(own, dtype=torch.int32)
        if own and rank % RANK_PAGE:
            a[own[-1] * RANK_PAGE + rank % RANK_PAGE : (own[-1] + 1) * RANK_PAGE] = 0
    scaling = torch.rand(len(RANKS), len(spans), device=device) + 0.5
    page_count = torch.tensor(counts, dtype=torch.int32, device=device)
    return Pool(a.to(dtype), b.to(dtype), scaling, slot_pages, page_count, spans)


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
        got = made.add(y, x, rows)
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
        assert torch.equal(made.add(y[own], x[own], rows[at : at + 1]), got[own]), (
            "a row's bits depend on its neighbours"
        )


def test_a_row_of_nan_stays_alone(dtype: torch.dtype, device: torch.device) -> None:
    made = pool(64, ((0, 96),), dtype, device)
    rows = [(1, 2)] * 5 + [(1, 0)]
    x, y = torch.randn(6, 64, dtype=dtype, device=device), torch.randn(6, 96, dtype=dtype, device=device)
    clean = made.add(y, x, rows)
    x[1] = float("nan")
    dirty = made.add(y, x, rows)
    others = [0, 2, 3, 4, 5]
    assert torch.equal(dirty[others], clean[others])
    assert dirty[1].isnan().all()
