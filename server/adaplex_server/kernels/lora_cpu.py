"""LoRA deltas on the CPU (see `kernels.lora`): a few products a linear, however the adapters are mixed.

The pool is read where it lies: the rank rows of slots that are neighbours in the pool are multiplied at once with all
their tokens, and what is not a token's own is taken out of h by selection (never by a factor of zero, which would let a
neighbour's infinity through). So a plan holds views of the pool and a little scratch memory, no weights; only an
adapter whose pages are scattered is copied, in rank order.

A row's sums do not depend on who shares the batch: BLAS sums every output in one order for any number of right-hand
columns but the very small, and for rows in multiples of eight; adding a neighbour's exact zeros changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

# Rank rows of different slots that are multiplied together at most, and at least where the pool has them.
_MOST_ROWS = 128
_LEAST_ROWS = 16
# From so many tokens on, a row is better multiplied with its own slot's rank rows alone.
_LONG = 32
_PADDING = 8

# [first page, last page), slot
_Run = tuple[int, int, int]


@dataclass(frozen=True)
class Group:
    """tokens: which of the step's (n of them). pool_rows: which of the pool's rank rows (R of them). slots: each
    token's.
    own: [n, R] bool, which rank rows are the token's; None when all are.
    """

    tokens: slice | torch.Tensor
    pool_rows: slice | torch.Tensor
    slots: tuple[int, ...]
    own: torch.Tensor | None


@dataclass(frozen=True)
class BoundGroup:
    """A group on one linear. M is n rounded up to a multiple of eight.

    a: by layer, [R * G, K]; b: by layer and target, [R, outputs of the target]; scaling: by layer, [G, M, 1] float32.
    x [M, K], h [G, M, R], delta [M, N]: float32 scratch; rows of x from n on stay zero. deltas: delta's columns by
    target. other: [M, R] bool, which rank rows are not the token's, or None.
    """

    tokens: slice | torch.Tensor
    count: int
    a: tuple[torch.Tensor, ...]
    b: tuple[tuple[torch.Tensor, ...], ...]
    scaling: tuple[torch.Tensor, ...]
    other: torch.Tensor | None
    x: torch.Tensor
    h: torch.Tensor
    delta: torch.Tensor
    deltas: tuple[torch.Tensor, ...]


def add(y: torch.Tensor, x: torch.Tensor, group: BoundGroup, layer: int) -> None:
    """y: [T, N] += the group's deltas on x: [T, K], in place."""
    tokens, count = group.tokens, group.count
    group.x[:count].copy_(x[tokens] if isinstance(tokens, slice) else x.index_select(0, tokens))
    targets, padded, rows = group.h.shape
    h = F.linear(group.x, group.a[layer].float())
    torch.mul(h.view(padded, rows, targets).permute(2, 0, 1), group.scaling[layer], out=group.h)
    if group.other is not None:
        group.h.masked_fill_(group.other, 0.0)
    for target, b in enumerate(group.b[layer]):
        torch.mm(group.h[target], b.float(), out=group.deltas[target])
    delta = group.delta[:count]
    if isinstance(tokens, slice):
        y[tokens].add_(delta)
    else:
        y.index_copy_(0, tokens, y.index_select(0, tokens).add_(delta))


def bind(
    group: Group, a: torch.Tensor, b: torch.Tensor, scaling: torch.Tensor, spans: Sequence[tuple[int, int]]
) -> BoundGroup:
    """a: [layers, pool rows, G, K]; b: [layers, pool rows, N]; scaling: [layers, slots, G]."""
    count = len(group.slots)
    padded = count + -count % _PADDING
    rows = group.pool_rows
    a, b = (a[:, rows], b[:, rows]) if isinstance(rows, slice) else (a.index_select(1, rows), b.index_select(1, rows))
    scales = scaling.new_zeros(scaling.shape[0], len(spans), padded, 1)
    scales[:, :, :count, 0] = scaling[:, list(group.slots)].transpose(1, 2)
    other = None
    if group.own is not None:
        other = torch.ones(padded, b.shape[1], dtype=torch.bool)
        other[:count] = ~group.own
    delta = torch.empty(padded, b.shape[2])
    return BoundGroup(
        tokens=group.tokens,
        count=count,
        a=a.flatten(1, 2).unbind(0),
        b=tuple(zip(*(b[:, :, begin:end].unbind(0) for begin, end in spans), strict=True)),
        scaling=scales.unbind(0),
        other=other,
        x=torch.zeros(padded, a.shape[3]),
        h=torch.empty(len(spans), padded, b.shape[1]),
        delta=delta,
        deltas=tuple(delta[:, begin:end] for begin, end in spans),
    )


def group(
    row_tokens: Sequence[int],
    row_slots: Sequence[int],
    host_pages: Mapping[int, tuple[int, ...]],
    page_rows: int,
    pool_pages: int,
) -> tuple[Group, ...]:
    """Long rows one by one, short rows together: those of neighbouring slots are joined. Slots below 0 are in no
    group.
    """
    shape = (page_rows, pool_pages)
    found: list[Group] = []
    short: dict[int, list[int]] = {}
    begin = 0
    for count, slot in zip(row_tokens, row_slots, strict=True):
        if slot >= 0 and count >= _LONG:
            found.append(_single(slot, list(range(begin, begin + count)), host_pages[slot], *shape))
        elif slot >= 0:
            short.setdefault(slot, []).extend(range(begin, begin + count))
        begin += count
    runs: list[_Run] = []
    for slot, tokens in short.items():
        pages = host_pages[slot]
        if _consecutive(pages):
            runs.append((pages[0], pages[-1] + 1, slot))
        else:
            found.append(_single(slot, tokens, pages, *shape))
    joined: list[list[_Run]] = []
    for run in sorted(runs):
        if joined and _worth_joining(joined[-1], run, page_rows):
            joined[-1].append(run)
        else:
            joined.append([run])
    return (*found, *(_join(members, short, *shape) for members in joined))


def _consecutive(pages: Sequence[int]) -> bool:
    return all(after == before + 1 for before, after in pairwise(pages))


def _single(slot: int, tokens: list[int], pages: Sequence[int], page_rows: int, pool_pages: int) -> Group:
    """Scattered pages are taken in rank order, so that a sum's order does not depend on where an adapter lies."""
    if _consecutive(pages):
        return _join([(pages[0], pages[-1] + 1, slot)], {slot: tokens}, page_rows, pool_pages)
    rows = (torch.tensor(pages).unsqueeze(1) * page_rows + torch.arange(page_rows)).flatten()
    return Group(_which(tokens), rows, (slot,) * len(tokens), None)


def _worth_joining(runs: list[_Run], run: _Run, page_rows: int) -> bool:
    """While the range stays small and at least half of it is somebody's."""
    pages = run[1] - runs[0][0]
    used = run[1] - run[0] + sum(last - first for first, last, _ in runs)
    return pages * page_rows <= _MOST_ROWS and 2 * used >= pages


def _join(runs: list[_Run], tokens_of: Mapping[int, list[int]], page_rows: int, pool_pages: int) -> Group:
    """Runs in ascending order, each of another slot."""
    least = -(-_LEAST_ROWS // page_rows)
    first, last = runs[0][0], runs[-1][1]
    last = max(last, min(first + least, pool_pages))
    first = min(first, max(0, last - least))
    slot_of_token = {token: slot for _, _, slot in runs for token in tokens_of[slot]}
    tokens = sorted(slot_of_token)
    slots = tuple(slot_of_token[token] for token in tokens)
    owners = torch.full((last - first,), -1)
    for begin, end, slot in runs:
        owners[begin - first : end - first] = slot
    own = torch.tensor(slots).unsqueeze(1) == owners.repeat_interleave(page_rows)
    rows = slice(first * page_rows, last * page_rows)
    return Group(_which(tokens), rows, slots, None if bool(own.all()) else own)


def _which(tokens: list[int]) -> slice | torch.Tensor:
    """Ascending tokens, as a slice where they follow one another."""
    if tokens[-1] - tokens[0] + 1 == len(tokens):
        return slice(tokens[0], tokens[-1] + 1)
    return torch.tensor(tokens)
