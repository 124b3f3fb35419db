"""Paged attention on the CPU (see `kernels.attention`): each token's sums in an order that its context alone decides.

A token's keys are taken from `first` (a multiple of 128; 0 without a window) on, padded to a width that is a power of
two and depends on its own position only; what it does not see is masked. So the lengths of all sums are the same for a
token that is decoded, prefilled in a chunk of any size, or computed again after a preemption; and as BLAS sums each
output of a product in one order from four rows on, its bits are the same too. Padding is read from page 0, which holds
zeros, so that no stale number (NaN) can reach a sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F

_LEAST_WIDTH = 128
# Rows of a product at least: with fewer, BLAS sums in another order.
_LEAST_ROWS = 4
# Scores of one product at most (float32 each), so that a chunk at a long context does not need gigabytes.
_MOST_SCORES = 1 << 24


@dataclass(frozen=True)
class Piece:
    """R rows of the step with n tokens each, whose visible contexts share the width C.

    tokens: which of the step's, row by row. entries: [R * KV * C] int64, indices into a layer's keys as [.., D]; head
    by head. bias: 0 or -inf, float32; [R * KV, 1, C] where n is 1, else [n, C] of the one row. distance: [R, n, C]
    int64, of a key from the query's own position; 0 or less where it is seen.
    """

    tokens: slice | torch.Tensor
    entries: torch.Tensor
    bias: torch.Tensor
    distance: torch.Tensor


@dataclass(frozen=True)
class _Score:
    """What becomes of a product q . k. softcap, slopes: as in `kernels.attention`."""

    scale: float
    softcap: float | None
    slopes: torch.Tensor | None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.slopes is None

    def bend(self, scores: torch.Tensor, slopes: tuple[int, ...], distance: torch.Tensor) -> None:
        """In place, scaled products to scores. slopes: the shape in which they broadcast, as distance does."""
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.slopes is not None:
            scores.addcmul_(self.slopes.view(slopes), distance.float())


@dataclass(frozen=True)
class _Span:
    """Consecutive tokens of one row, of the same first and width. position: of the first of them."""

    row: int
    token: int
    position: int
    count: int
    first: int
    width: int


def plan(
    page_table: torch.Tensor,
    row_tokens: Sequence[int],
    row_contexts: Sequence[int],
    page_size: int,
    kv_heads: int,
    heads: int,
    window: int | None,
) -> tuple[Piece, ...]:
    """Once a step: rows with one token together where their widths agree, longer ones by themselves."""
    single: dict[int, list[_Span]] = {}
    pieces: list[Piece] = []
    token = 0
    for row, (count, context) in enumerate(zip(row_tokens, row_contexts, strict=True)):
        for span in _spans(row, token, count, context, window, heads):
            if count == 1:
                single.setdefault(span.width, []).append(span)
            else:
                pieces.append(_piece([span], page_table, row_contexts, page_size, kv_heads, window))
        token += count
    pieces.extend(_piece(spans, page_table, row_contexts, page_size, kv_heads, window) for spans in single.values())
    return tuple(pieces)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pieces: Sequence[Piece],
    scale: float,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """q: [T, H, D]. Returns [T, H * D] in q's dtype."""
    score = _Score(scale, softcap, slopes)
    if len(pieces) == 1:
        return _attend(q, keys, values, pieces[0], score)
    out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
    for piece in pieces:
        tokens = piece.tokens
        if isinstance(tokens, slice):
            out[tokens] = _attend(q[tokens], keys, values, piece, score)
        else:
            out.index_copy_(0, tokens, _attend(q.index_select(0, tokens), keys, values, piece, score))
    return out


def _spans(row: int, token: int, count: int, context: int, window: int | None, heads: int) -> Iterator[_Span]:
    """The row's tokens by first and width, and not too many at once."""
    before = context - count

    def extent(position: int) -> tuple[int, int]:
        first = 0 if window is None else max(0, position + 1 - window) // _LEAST_WIDTH * _LEAST_WIDTH
        return first, max(_LEAST_WIDTH, 1 << (position - first).bit_length())

    for (first, width), same in groupby(range(before, context), extent):
        positions = list(same)
        most = max(_LEAST_ROWS, _MOST_SCORES // (heads * width))
        for begin in range(0, len(positions), most):
            part = positions[begin : begin + most]
            yield _Span(row, token + part[0] - before, part[0], len(part), first, width)


def _piece(
    spans: list[_Span],
    page_table: torch.Tensor,
    row_contexts: Sequence[int],
    page_size: int,
    kv_heads: int,
    window: int | None,
) -> Piece:
    """spans: of equal count and width."""
    rows, tokens, firsts, starts = torch.tensor([(s.row, s.token, s.first, s.position) for s in spans]).unbind(1)
    width, count = spans[0].width, spans[0].count
    written = torch.tensor([row_contexts[s.row] for s in spans]).unsqueeze(1)
    positions = firsts.unsqueeze(1) + torch.arange(width)
    pages = page_table.index_select(0, rows).long()
    slots = pages.gather(1, (positions // page_size).clamp_(max=pages.shape[1] - 1)) * page_size + positions % page_size
    slots = slots.masked_fill_(positions >= written, 0)
    entries = slots.unsqueeze(1) * kv_heads + torch.arange(kv_heads).unsqueeze(1)
    own = (starts.unsqueeze(1) + torch.arange(count)).unsqueeze(2)
    distance = positions.unsqueeze(1) - own
    seen = distance <= 0
    if window is not None:
        seen &= distance > -window
    bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    bias = bias.repeat_interleave(kv_heads, 0) if count == 1 else bias[0]
    where = slice(spans[0].token, spans[0].token + count) if len(spans) == 1 else tokens
    return Piece(where, entries.flatten(), bias, distance)


def _attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, piece: Piece, score: _Score) -> torch.Tensor:
    """q: the piece's tokens, [.., H, D], in its order."""
    dim, kv_heads, width = q.shape[2], keys.shape[2], piece.bias.shape[-1]
    k = keys.view(-1, dim).index_select(0, piece.entries).float().view(-1, width, dim)
    v = values.view(-1, dim).index_select(0, piece.entries).float().view(-1, width, dim)
    if piece.bias.dim() == 3:
        return _single(q, k, v, piece, score)
    return _chunk(q, k, v, piece, score, kv_heads)


def _single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: Piece, score: _Score) -> torch.Tensor:
    """R rows of one token each. k, v: [R * KV, C, D]. Few operations: this is all of decoding."""
    rows, heads, dim = q.shape
    products, width = k.shape[:2]
    kv_heads = products // rows
    group = heads // kv_heads
    queries = torch.zeros(products, max(group, _LEAST_ROWS), dim)
    queries.view(rows, kv_heads, -1, dim)[:, :, :group].copy_(q.view(rows, kv_heads, group, dim))
    if score.plain:
        scores = torch.baddbmm(piece.bias, queries, k.mT, alpha=score.scale)
    else:
        scores = _products(queries, k, score.scale)
        own = scores.view(rows, kv_heads, -1, width)[:, :, :group]
        score.bend(own, (kv_heads, group, 1), piece.distance.unsqueeze(1))
        scores += piece.bias
    out = torch.empty(products, group, dim, dtype=q.dtype)
    return out.copy_(torch.bmm(scores.softmax(-1), v)[:, :group]).view(rows, heads * dim)


def _chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: Piece, score: _Score, kv_heads: int
) -> torch.Tensor:
    """n tokens of one row. k, v: [KV, C, D]."""
    (count, heads, dim), width = q.shape, k.shape[1]
    group = heads // kv_heads
    queries = q.float().view(count, kv_heads, group, dim).transpose(0, 1).reshape(kv_heads, count * group, dim)
    padding = max(0, _LEAST_ROWS - count * group)
    if padding:
        queries = F.pad(queries, (0, 0, 0, padding))
    scores = _products(queries, k, score.scale)
    own = scores[:, : count * group].view(kv_heads, count, group, width)
    score.bend(own, (kv_heads, 1, group, 1), piece.distance[0].unsqueeze(1))
    own += piece.bias.unsqueeze(1)
    out = torch.bmm(scores.softmax(-1), v)[:, : count * group]
    return out.reshape(kv_heads, count, group, dim).transpose(0, 1).reshape(count, heads * dim).to(q.dtype)


def _products(queries: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.baddbmm(queries.new_empty(()), queries, k.mT, beta=0, alpha=scale)
