"""LoRA (Hu et al. 2021) on one fused linear, tokens of different adapters and ranks side by side.

    h[t, i, g] = a[i, g] . x[t]                                         rank rows i of token t's own slot, target g
    y[t, n]   += sum_i scaling[slot, g] * h[t, i, g] * b[i, n]          outputs n in the span of g

in float32 whatever the dtypes, rounded once into y. A token without an adapter is not touched.

On the CPU the pool is read where it lies: neighbouring rank pages of several slots are multiplied at once with all
their tokens, and what is not a token's own is taken out of h by selection (never by a factor of zero, which lets an
infinity through).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from adaplex_server.kernels import dense
from adaplex_server.kernels.lora_tiles import LoraTiles, lora_tiles

# Rank rows of different slots that are multiplied together at most, and tokens from which a row is better multiplied
# with its own slot's alone.
_JOINED_ROWS = 128
_LONG = 32

# [first page, last page), slot
_Run = tuple[int, int, int]


@dataclass(frozen=True)
class LoraGroup:
    """tokens: which of the step's (n of them). pool_rows: which of the pool's rank rows (R of them). slots: [n] int64,
    the token's slot. own: [n, R] bool, which rank rows are the token's; None when all are.
    """

    tokens: slice | torch.Tensor
    pool_rows: slice | torch.Tensor
    slots: torch.Tensor
    own: torch.Tensor | None


@dataclass(frozen=True)
class LoraRows:
    """A step's adapters, shared by its layers: tiles on CUDA, groups elsewhere."""

    tiles: LoraTiles | None
    groups: tuple[LoraGroup, ...]
    slot_pages: torch.Tensor
    slot_page_count: torch.Tensor
    page_rows: int


@dataclass(frozen=True)
class LoraWeights:
    """One linear's rank rows in one layer. a: [pool rows, G, K]; b: [pool rows, N]; scaling: [slots, G] float32;
    spans: [begin, end) of each target.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor
    spans: tuple[tuple[int, int], ...]


def lora_rows(
    row_tokens: Sequence[int],
    row_slots: Sequence[int],
    host_pages: Mapping[int, tuple[int, ...]],
    slot_pages: torch.Tensor,
    slot_page_count: torch.Tensor,
    page_rows: int,
) -> LoraRows | None:
    """Once a step; None when no row has an adapter (a negative slot is none). host_pages: slot -> its pages;
    page_rows: rank rows of a page.
    """
    if all(slot < 0 for slot in row_slots):
        return None
    shared = (slot_pages, slot_page_count, page_rows)
    if slot_pages.is_cuda:
        tiles = lora_tiles(row_tokens, row_slots, lambda slot: len(host_pages[slot]), slot_pages.device)
        return LoraRows(tiles, (), *shared)
    return LoraRows(None, _groups(row_tokens, row_slots, host_pages, page_rows), *shared)


def add_lora(y: torch.Tensor, x: torch.Tensor, weights: LoraWeights, rows: LoraRows) -> None:
    """y: [T, N] += the delta of each token's own adapter on x: [T, K], in place."""
    if y.is_cuda:
        from adaplex_server.kernels.gpu import lora as gpu

        tiles = rows.tiles
        assert tiles is not None
        gpu.add_lora(
            y, x, weights.a, weights.b, weights.scaling, rows.slot_pages, rows.slot_page_count, weights.spans,
            tiles.order, tiles.tiles, tiles.tile_tokens, tiles.max_pages, rows.page_rows,
        )  # fmt: skip
        return
    wide = x.float()
    for group in rows.groups:
        _add_group(y, wide, weights, group)


def reference(
    y: torch.Tensor, x: torch.Tensor, weights: LoraWeights, slots: Sequence[int], rows: LoraRows
) -> torch.Tensor:
    """What y becomes, token by token as the formula says it; on any device. slots: each token's."""
    out = y.clone()
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        pages = rows.slot_pages[slot, : int(rows.slot_page_count[slot])].long()
        own = (pages[:, None] * rows.page_rows + torch.arange(rows.page_rows, device=pages.device)).flatten()
        h = torch.einsum("rgk,k->rg", weights.a[own].float(), x[token].float()) * weights.scaling[slot]
        for target, (begin, end) in enumerate(weights.spans):
            delta = h[:, target] @ weights.b[own, begin:end].float()
            out[token, begin:end] = (y[token, begin:end].float() + delta).to(y.dtype)
    return out


def _add_group(y: torch.Tensor, x: torch.Tensor, weights: LoraWeights, group: LoraGroup) -> None:
    targets = len(weights.spans)
    a, b = _take(weights.a, group.pool_rows).flatten(0, 1), _take(weights.b, group.pool_rows)
    if b.dtype != torch.float32:
        a, b = a.float(), b.float()
    h = dense.linear(_take(x, group.tokens), a).view(group.slots.shape[0], -1, targets).permute(2, 0, 1)
    h = h * weights.scaling.index_select(0, group.slots).t().unsqueeze(2)
    if group.own is not None:
        h = torch.where(group.own, h, 0.0)
    delta = torch.empty(h.shape[1], b.shape[1])
    for target, (begin, end) in enumerate(weights.spans):
        torch.mm(h[target], b[:, begin:end], out=delta[:, begin:end])
    if isinstance(group.tokens, slice):
        y[group.tokens].add_(delta)
    else:
        y.index_copy_(0, group.tokens, y.index_select(0, group.tokens).add_(delta))


def _take(source: torch.Tensor, which: slice | torch.Tensor) -> torch.Tensor:
    return source[which] if isinstance(which, slice) else source.index_select(0, which)


def _groups(
    row_tokens: Sequence[int], row_slots: Sequence[int], host_pages: Mapping[int, tuple[int, ...]], page_rows: int
) -> tuple[LoraGroup, ...]:
    """Long rows one by one, short rows together: those of neighbouring slots are joined."""
    found: list[LoraGroup] = []
    short: dict[int, list[int]] = {}
    begin = 0
    for count, slot in zip(row_tokens, row_slots, strict=True):
        if slot >= 0 and count >= _LONG:
            found.append(_single(slot, list(range(begin, begin + count)), host_pages[slot], page_rows))
        elif slot >= 0:
            short.setdefault(slot, []).extend(range(begin, begin + count))
        begin += count
    joined: list[list[_Run]] = []
    for slot, tokens in short.items():
        if not _consecutive(host_pages[slot]):
            found.append(_single(slot, tokens, host_pages[slot], page_rows))
    runs = ((host_pages[slot][0], host_pages[slot][-1] + 1, slot) for slot in short if _consecutive(host_pages[slot]))
    for run in sorted(runs):
        if joined and _worth_joining(joined[-1], run, page_rows):
            joined[-1].append(run)
        else:
            joined.append([run])
    return (*found, *(_join(runs, short, page_rows) for runs in joined))


def _consecutive(pages: Sequence[int]) -> bool:
    return all(after == before + 1 for before, after in pairwise(pages))


def _single(slot: int, tokens: list[int], pages: Sequence[int], page_rows: int) -> LoraGroup:
    """Scattered pages are gathered in rank order, so that a sum's order does not depend on where an adapter lies."""
    if _consecutive(pages):
        return _join([(pages[0], pages[-1] + 1, slot)], {slot: tokens}, page_rows)
    rows = (torch.tensor(pages).unsqueeze(1) * page_rows + torch.arange(page_rows)).flatten()
    return LoraGroup(_which(tokens), rows, torch.full((len(tokens),), slot), None)


def _worth_joining(runs: list[_Run], run: _Run, page_rows: int) -> bool:
    """While the range stays small and at least half of it is somebody's."""
    pages = run[1] - runs[0][0]
    used = run[1] - run[0] + sum(last - first for first, last, _ in runs)
    return pages * page_rows <= _JOINED_ROWS and 2 * used >= pages


def _join(runs: list[_Run], tokens_of: Mapping[int, list[int]], page_rows: int) -> LoraGroup:
    """Runs in ascending order, each of another slot."""
    first, last = runs[0][0], runs[-1][1]
    slot_of_token = {token: slot for _, _, slot in runs for token in tokens_of[slot]}
    tokens = sorted(slot_of_token)
    slots = torch.tensor([slot_of_token[token] for token in tokens])
    own = None
    if len(runs) > 1:
        owners = torch.full((last - first,), -1)
        for begin, end, slot in runs:
            owners[begin - first : end - first] = slot
        own = slots.unsqueeze(1) == owners.repeat_interleave(page_rows)
    return LoraGroup(_which(tokens), slice(first * page_rows, last * page_rows), slots, own)


def _which(tokens: list[int]) -> slice | torch.Tensor:
    """Ascending tokens, as a slice where they follow one another."""
    if tokens[-1] - tokens[0] + 1 == len(tokens):
        return slice(tokens[0], tokens[-1] + 1)
    return torch.tensor(tokens)
