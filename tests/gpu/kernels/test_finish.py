"""Finished linears of mixed batches against float64, and each token's bits against what it has alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from adaplex_server.kernels.activation import activate
from adaplex_server.kernels.finish import OutputScale, Shrunk, Unfinished
from adaplex_server.kernels.gpu import shrink as shrinking
from adaplex_server.kernels.gpu.finish import finish, finish_activation, finish_rotary, fits_rotary
from adaplex_server.kernels.gpu.finish_norm import finish_add_norm
from adaplex_server.kernels.gpu.shrink import empty_h, segments, shrink
from adaplex_server.kernels.norm import reference as norm_reference
from support.lora_pool import RANK_PAGE, RANKS, Pool, pool, tiles_of

Rows = list[tuple[int, int]]
# Rows as (tokens, slot).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LARGE = 2 if INTERPRETED else 3
MIXED: Rows = [(1, LARGE), (5, 0), (1, 1), (2, -1), (2, 2), (1, LARGE), (1, 4), (1, 5)]
ALONE = (0, 3, 7) if INTERPRETED else tuple(range(len(MIXED)))
# Two segments of more than one step; smaller ones where each number takes time.
K = 700 if INTERPRETED else 8400
HEADS, KV_HEADS, DIM = 6, 2, 16
QKV = ((0, 96), (96, 128), (128, 160))


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(shrinking, "_SEGMENT", 512)
        monkeypatch.setattr(shrinking, "_STEP", 256)


class Case:
    """Mixed rows through one linear: parts of a product, and adapters on its input."""

    def __init__(
        self, spans: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device, splits: int
    ) -> None:
        self.pool: Pool = pool(K, spans, dtype, device)
        self.tokens, n = sum(count for count, _ in MIXED), spans[-1][1]
        self.x = torch.randn(self.tokens, K, dtype=dtype, device=device)
        parts = torch.randn(splits, self.tokens, n, device=device)
        self.parts = parts if splits > 1 else parts.to(dtype)
        self.bias = torch.randn(n, dtype=dtype, device=device)
        self.starts = [0, *accumulate(count for count, _ in MIXED)]
        self.vectors = torch.rand(12, n, device=device) + 0.25
        self.index = 4 * torch.randint(-1, 3, (self.tokens,), device=device, dtype=torch.int32)

    def rows(self, row: int) -> slice:
        return slice(self.starts[row], self.starts[row + 1])

    def unfinished(self, rows: slice = slice(None), some: Rows | None = None, scaled: bool = False) -> Unfinished:
        x = self.x[rows]
        tiles = tiles_of(MIXED if some is None else some, x.device)
        shrunk = None
        if tiles is not None:
            made = self.pool
            h = empty_h(x, tiles.max_pages, RANK_PAGE, len(made.spans))
            shrink(
                x, made.a, h, made.slot_pages, made.slot_page_count, tiles.order, tiles.tiles, tiles.tile_tokens,
                tiles.max_pages, RANK_PAGE, beside=False,
            )  # fmt: skip
            pages = made.slot_pages, made.slot_page_count
            shrunk = Shrunk(h, made.b, made.scaling, made.spans, *pages, RANK_PAGE, tiles)
        scale = OutputScale(self.vectors, self.index[rows]) if scaled else None
        return Unfinished(self.parts[:, rows].contiguous(), x.dtype, self.bias, shrunk, scale)

    def expected(self, scaled: bool = False) -> torch.Tensor:
        total = self.parts.double().sum(0)
        for row, (_, slot) in enumerate(MIXED):
            if slot >= 0:
                total[self.rows(row)] += self.pool.delta(self.x[self.rows(row)], slot)
        bias = self.bias.double().expand(total.shape)
        if scaled:
            own = (self.index >= 0)[:, None]
            factor, kept = self.vectors.double().view(3, 2, 2, -1).sum(2)[self.index.clamp(min=0) // 4].unbind(1)
            total, bias = torch.where(own, total * factor, total), torch.where(own, bias * kept, bias)
        return total + bias

    def alone(self, run: Callable[[Unfinished, slice], torch.Tensor], together: torch.Tensor) -> None:
        for row in ALONE:
            found = run(self.unfinished(self.rows(row), [MIXED[row]]), self.rows(row))
            assert torch.equal(found, together[self.rows(row)]), f"the bits of row {row} depend on its neighbours"


@pytest.mark.parametrize(
    "spans", [((0, 600),), ((0, 70), (70, 90))] if INTERPRETED else [((0, 1100),), ((0, 530), (530, 600))]
)
@pytest.mark.parametrize("splits", [1, 3])
def test_finish(
    spans: tuple[tuple[int, int], ...],
    splits: int,
    dtype: torch.dtype,
    device: torch.device,
    check: Callable[..., None],
) -> None:
    case = Case(spans, dtype, device, splits)
    assert segments(K) == 2
    got = finish(case.unfinished())
    check(got, case.expected(), factor=2)
    case.alone(lambda y, _: finish(y), got)
    scaled = finish(case.unfinished(scaled=True))
    check(scaled, case.expected(scaled=True), factor=2)
    assert torch.equal(scaled[case.index < 0], got[case.index < 0])


@pytest.mark.parametrize(
    ("gated", "spans"),
    [(True, ((0, 40), (40, 80))), (True, ((0, 80),)), (False, ((0, 80),))],
    ids=["gated", "gated, one target", "plain"],
)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activation(
    gated: bool,
    spans: tuple[tuple[int, int], ...],
    activation: str,
    dtype: torch.dtype,
    device: torch.device,
    check: Callable[..., None],
) -> None:
    case = Case(spans, dtype, device, 2)

    def run(y: Unfinished, _: slice) -> torch.Tensor:
        return finish_activation(y, activation, gated)

    got = run(case.unfinished(), slice(None))
    check(got, activate(case.expected().cpu(), activation, gated).to(device), factor=2)
    case.alone(run, got)


@pytest.mark.parametrize("center", [False, True])
def test_norm(center: bool, dtype: torch.dtype, device: torch.device, check: Callable[..., None]) -> None:
    case = Case(((0, 300),), dtype, device, 4)
    x = torch.randn(case.tokens, 300, dtype=dtype, device=device)
    weight, bias = torch.randn(2, 300, dtype=dtype, device=device)

    def run(y: Unfinished, rows: slice) -> torch.Tensor:
        total, normed = finish_add_norm(x[rows], y, weight, bias if center else None, 1e-5, center)
        return torch.stack((total, normed), 1)

    got = run(case.unfinished(), slice(None))
    check(got[:, 0], x.double() + case.expected(), factor=2)
    check(got[:, 1], norm_reference(got[:, 0], weight, bias if center else None, 1e-5, center), factor=2)
    case.alone(run, got)


@pytest.mark.parametrize(
    ("with_norm", "spans"), [(False, QKV), (True, QKV), (False, ((0, 160),))], ids=["plain", "norm", "one target"]
)
def test_rotary(
    with_norm: bool,
    spans: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    device: torch.device,
    check: Callable[..., None],
) -> None:
    case = Case(spans, dtype, device, 2)
    angles = torch.arange(64, device=device)[:, None] * torch.rand(DIM // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(0, 64, (case.tokens,), device=device)
    places = torch.randperm(4 * 16, device=device)[: case.tokens]
    places[5] = -1
    weights = torch.randn(2, DIM, dtype=dtype, device=device)

    def run(y: Unfinished, rows: slice) -> torch.Tensor:
        keys, values = torch.zeros(2, 4, 16, KV_HEADS, DIM, dtype=dtype, device=device)
        w = tuple(weights) if with_norm else (None, None)
        q = finish_rotary(y, HEADS, positions[rows], places[rows], cos, sin, keys, values, *w, 1e-6)
        written = torch.stack((keys, values), 2).flatten(0, 1)[places[rows]].flatten(1, 2)
        written[places[rows] < 0] = 0
        untouched = torch.ones(4 * 16, dtype=torch.bool, device=device)
        untouched[places[rows][places[rows] >= 0]] = False
        assert not keys.flatten(0, 1)[untouched].any() and not values.flatten(0, 1)[untouched].any()
        return torch.cat((q, written), 1)

    got = run(case.unfinished(), slice(None))
    q, k, v = case.expected().view(case.tokens, -1, DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
    c, s = cos[positions][:, None].double(), sin[positions][:, None].double()

    def turned(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = F.rms_norm(x, (DIM,), weight.double(), 1e-6) if with_norm else x
        first, second = x.chunk(2, -1)
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    check(got[:, :HEADS], turned(q, weights[0]), factor=2)
    live = places >= 0
    check(got[live, HEADS : HEADS + KV_HEADS], turned(k, weights[1])[live], factor=2)
    check(got[live, HEADS + KV_HEADS :], v[live], factor=2)
    case.alone(run, got)


def test_what_rotary_does_not_fit() -> None:
    assert fits_rotary(64, 128, True) and fits_rotary(48, 96, False)
    assert not fits_rotary(16, 64, False) and not fits_rotary(48, 96, True)


def test_a_row_of_nan_stays_alone(dtype: torch.dtype, device: torch.device) -> None:
    case = Case(((0, 96),), dtype, device, 2)
    clean = finish(case.unfinished())
    row = case.rows(4)
    case.x[row.start + 1] = float("nan")
    dirty = finish(case.unfinished())
    others = torch.arange(case.tokens) != row.start + 1
    assert torch.equal(dirty[others], clean[others])
    assert dirty[row.start + 1].isnan().all()
    assert RANKS[MIXED[4][1]] > 0
