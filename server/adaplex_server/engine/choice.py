"""A random token of each row: the inverse of its distribution function at one uniform number.

Order of the filters as in transformers and vLLM: temperature, then top_k, top_p, min_p. In the order of falling
probability (ties: lower id first) each filter keeps a beginning, so together they keep the shortest of these.

Sorting the whole vocabulary is dear, so a few of the likeliest tokens are tried first (`_PREFIXES`); a row that keeps
more goes on, at last to the full sort. Where it stops depends on that row alone, and its token does not depend on it.
Rows without a filter need no order at all and go by token id. Sums run in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adaplex_server.engine.randomness import uniform
from adaplex_server.engine.row import Row

_PREFIXES = (256, 4096)


def choose_randomly(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """logits [R, V] float32, every row with temperature > 0. Token ids [R] int64."""
    temperature = _column([row.sampling.temperature for row in rows], logits)
    # The largest logit is subtracted first: a tiny temperature must not overflow.
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature.float()).softmax(-1)
    u = _column([uniform(row.sampling.seed, row.generated) for row in rows], logits)
    filtered = [i for i, row in enumerate(rows) if _filters(row)]
    if not filtered:
        return _invert(_cumulate(p), u)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    free = [i for i in range(len(rows)) if i not in set(filtered)]
    if free:
        tokens[free] = _invert(_cumulate(p[free]), u[free])
    tokens[filtered] = _choose_filtered(p[filtered], u[filtered], [rows[i] for i in filtered])
    return tokens


def _filters(row: Row) -> bool:
    s = row.sampling
    return s.top_k > 0 or s.top_p < 1 or s.min_p > 0


def _choose_filtered(p: torch.Tensor, u: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Among the likeliest tokens first, and once more among more of them for the rows that kept all that were sure."""
    tokens = torch.empty(len(rows), dtype=torch.int64, device=p.device)
    left = list(range(len(rows)))
    for width in _PREFIXES:
        part = [rows[i] for i in left]
        values, ids, sure = _likeliest(p[left], width)
        tokens[left], kept = _pick(values, ids, u[left], part)
        short = torch.tensor([row.sampling.top_k > width for row in part], device=p.device) | (kept > sure)
        left = [left[i] for i in short.nonzero()[:, 0].tolist()]
        if not left:
            return tokens
    values, ids = torch.sort(p[left], dim=-1, descending=True, stable=True)
    tokens[left] = _pick(values, ids, u[left], [rows[i] for i in left])[0]
    return tokens


def _likeliest(p: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `width` likeliest of each row in falling order, lower ids first among equals: values and ids [R, width]; and
    how many of them are sure [R]. Which of several tokens equal to the last one are here is left to topk, so these
    are not.
    """
    values, ids = p.topk(min(width, p.shape[-1]), dim=-1)
    ids, by_id = ids.sort(-1)
    values, by_value = torch.sort(values.gather(-1, by_id), dim=-1, descending=True, stable=True)
    whole = values.shape[-1] == p.shape[-1]
    sure = torch.full_like(ids[:, 0], p.shape[-1]) if whole else (values > values[:, -1:]).sum(-1)
    return values, ids.gather(-1, by_value), sure


def _pick(
    p: torch.Tensor, ids: torch.Tensor, u: torch.Tensor, rows: Sequence[Row]
) -> tuple[torch.Tensor, torch.Tensor]:
    """p, ids [R, K] in falling order. The tokens [R], and how many of the K were kept [R]."""
    width = p.shape[-1]
    top_k = _column([row.sampling.top_k or width for row in rows], p).long()
    top_p = _column([row.sampling.top_p for row in rows], p)
    min_p = _column([row.sampling.min_p for row in rows], p)
    sums = _cumulate(p)
    limited = torch.tensor([[row.sampling.top_k > 0] for row in rows], device=p.device)
    mass = torch.where(limited, sums.gather(-1, top_k.clamp(max=width) - 1), 1.0)
    by_top_p = ((sums - p.double()) < top_p * mass).sum(-1, keepdim=True)
    by_min_p = (p.double() >= min_p * p[:, :1].double()).sum(-1, keepdim=True)
    by_top_p = torch.where(top_p < 1, by_top_p, width)
    kept = torch.minimum(torch.minimum(top_k, by_top_p), by_min_p).clamp(min=1, max=width)
    return ids.gather(-1, _invert(sums, u, kept)[:, None])[:, 0], kept[:, 0]


def _invert(sums: torch.Tensor, u: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """sums [R, K]: running sums. The first place whose sum is above u times the sum over the `kept` first ones."""
    last = sums[:, -1:] if kept is None else sums.gather(-1, kept - 1)
    place = (sums <= u * last).sum(-1)
    return torch.minimum(place, (sums < last).sum(-1))


def _cumulate(p: torch.Tensor) -> torch.Tensor:
    """Running sums in float64. One row on a GPU is summed beside a copy of itself: torch scans a lone vector by another
    algorithm, and a row's choice must not depend on having company.
    """
    if p.is_cuda and p.shape[0] == 1:
        return p.expand(2, -1).double().cumsum(-1)[:1]
    return p.double().cumsum(-1)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
