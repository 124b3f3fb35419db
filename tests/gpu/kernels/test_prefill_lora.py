"""LoRA of many tokens against each token computed alone, in float64; with and without the activation after it."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from adaplex_server.kernels.gpu.prefill_lora import Expansion, SlotPages, expand, expand_activation, shrink
from adaplex_server.kernels.lora_tiles import LoraTiles
from support.lora_pool import RANK_PAGE, RANKS, Pool, pages_of, pool

Spans = tuple[tuple[int, int], ...]
SHAPES: tuple[tuple[int, Spans], ...] = (
    (40, ((0, 24), (24, 32), (32, 40))),
    (1100, ((0, 150),)),
    (64, ((0, 530), (530, 600))),
    (4096, ((0, 256), (256, 320), (320, 384))),
)
if os.environ.get("TRITON_INTERPRET") == "1":
    SHAPES = SHAPES[:2]
# Rows as (tokens, slot).
ROWS = [(1, 3), (20, 0), (1, 1), (2, -1), (70, 2), (3, 4), (1, 3), (1, 0), (9, 5)]


def tiles_of(rows: list[tuple[int, int]], tile_tokens: int, device: torch.device) -> LoraTiles:
    """Of all tokens, the base's too."""
    slots = [slot for count, slot in rows for _ in range(count)]
    order = sorted(range(len(slots)), key=lambda token: slots[token])
    tiles: list[tuple[int, int, int]] = []
    for at, token in enumerate(order):
        if tiles and tiles[-1][2] == slots[token] and tiles[-1][1] < tile_tokens:
            begin, count, slot = tiles[-1]
            tiles[-1] = (begin, count + 1, slot)
        else:
            tiles.append((at, 1, slots[token]))
    tiles.append((0, 0, 0))
    most = max((pages_of(slot) for _, slot in rows if slot >= 0), default=0)
    of = torch.tensor
    return LoraTiles(
        of(order, dtype=torch.int32, device=device), of(tiles, dtype=torch.int32, device=device), tile_tokens, most
    )


def expansion(made: Pool, x: torch.Tensor, rows: list[tuple[int, int]], tile_tokens: int) -> Expansion:
    slots, tiles = SlotPages(made.slot_pages, made.slot_page_count, RANK_PAGE), tiles_of(rows, tile_tokens, x.device)
    return Expansion(shrink(x, made.a, made.scaling, slots, tiles, made.b.dtype), made.b, made.spans, slots, tiles)


def parts_of(rows: list[tuple[int, int]]) -> list[tuple[int, slice]]:
    """Each row's slot and tokens."""
    starts = [0, *accumulate(count for count, _ in rows)]
    return [(slot, slice(begin, begin + count)) for (count, slot), begin in zip(rows, starts, strict=False)]


@pytest.mark.parametrize(("k", "spans"), SHAPES)
@pytest.mark.parametrize("tile_tokens", [16, 64])
def test_mixed_rows(
    k: int,
    spans: Spans,
    tile_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    check: Callable[..., None],
) -> None:
    made, tokens = pool(k, spans, dtype, device), sum(count for count, _ in ROWS)
    x = torch.randn(tokens, k, dtype=dtype, device=device)
    y = torch.randn(tokens, spans[-1][1], dtype=dtype, device=device)
    got, expected = y.clone(), y.double()
    expand(got, expansion(made, x, ROWS, tile_tokens))
    for slot, own in parts_of(ROWS):
        if slot >= 0:
            expected[own] += made.delta(x[own], slot)
    check(got, expected, factor=2)
    for slot, own in parts_of(ROWS):
        if slot < 0 or RANKS[slot] == 0:
            assert torch.equal(got[own], y[own])
    for at in (0, 1, 8):
        own = parts_of(ROWS)[at][1]
        alone = y[own].clone()
        expand(alone, expansion(made, x[own], [ROWS[at]], tile_tokens))
        assert torch.equal(alone, got[own]), "a row's bits depend on its neighbours"


@pytest.mark.parametrize(("width", "targets"), [(100, 1), (300, 2)])
def test_with_the_activation_in_the_same_pass(
    width: int, targets: int, dtype: torch.dtype, device: torch.device, check: Callable[..., None]
) -> None:
    """Near what the formulas say, and without an adapter the very same; with one target where adapters have the linear
    as a whole.
    """
    spans = ((0, 2 * width),) if targets == 1 else ((0, width), (width, 2 * width))
    made, tokens = pool(96, spans, dtype, device), sum(count for count, _ in ROWS)
    x = torch.randn(tokens, 96, dtype=dtype, device=device)
    y = torch.randn(tokens, 2 * width, dtype=dtype, device=device)
    got, expected = expand_activation(y, expansion(made, x, ROWS, 64), "silu"), y.double()
    for slot, own in parts_of(ROWS):
        if slot >= 0:
            expected[own] += made.delta(x[own], slot)
    check(got, F.silu(expected[:, :width]) * expected[:, width:], factor=2)
    for slot, own in parts_of(ROWS):
        if slot < 0:
            plain = F.silu(y[own, :width].float()) * y[own, width:].float()
            torch.testing.assert_close(got[own], plain.to(dtype))


def test_a_row_of_nan_stays_alone(dtype: torch.dtype, device: torch.device) -> None:
    made = pool(64, ((0, 96),), dtype, device)
    rows = [(5, 2), (1, 0)]
    x, y = torch.randn(6, 64, dtype=dtype, device=device), torch.randn(6, 96, dtype=dtype, device=device)
    clean, dirty = y.clone(), y.clone()
    expand(clean, expansion(made, x, rows, 64))
    x[1] = float("nan")
    expand(dirty, expansion(made, x, rows, 64))
    others = [0, 2, 3, 4, 5]
    assert torch.equal(dirty[others], clean[others])
    assert dirty[1].isnan().all()
