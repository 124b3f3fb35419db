"""A random token of each row: the inverse of its distribution function at one uniform number.

Order of the filters as in transformers and vLLM: temperature, then top_k, top_p, min_p. In the order of falling
probability (ties: lower id first) each filter keeps a beginning, so together they keep the shortest of these.

Sorting the whole vocabulary is dear, so a few of the likeliest tokens are tried first (`_PREFIXES`); a row that keeps
more goes on, at last to the full sort. Where it stops depends on that row alone, and its token does not depend on it.
Rows without a filter need no order at all and go by token id. Sums run in float64. On a GPU: `gpu/choice.py`.

Notation: R rows, V vocabulary. wishes: [R, 5] float64 on the host, of each row its temperature (over 0), its uniform
number u in [0, 1), top_k (0: all), top_p (1: all) and min_p (0: all).
"""

from __future__ import annotations

import numpy as np
import torch

_PREFIXES = (256, 4096)


def choose(logits: torch.Tensor, wishes: np.ndarray) -> torch.Tensor:
    """logits [R, V] float32. Token ids [R] int64."""
    if logits.is_cuda:
        from adaplex_server.kernels.gpu import choice as gpu

        on_device = torch.from_numpy(wishes).pin_memory().to(logits.device, non_blocking=True)
        return gpu.choose(logits, on_device)
    temperature, u, *filters = torch.from_numpy(wishes).split(1, dim=1)
    # The largest logit is subtracted first: a tiny temperature must not overflow.
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature.float()).softmax(-1)
    wanted = torch.cat(filters, 1)
    filtered = ((wanted[:, 0] > 0) | (wanted[:, 1] < 1) | (wanted[:, 2] > 0)).nonzero()[:, 0]
    if not len(filtered):
        return _invert(_cumulate(p), u)
    tokens = torch.empty(len(wishes), dtype=torch.int64)
    free = torch.ones(len(wishes), dtype=torch.bool).index_fill_(0, filtered, False).nonzero()[:, 0]
    if len(free):
        tokens[free] = _invert(_cumulate(p[free]), u[free])
    tokens[filtered] = _choose_filtered(p[filtered], u[filtered], wanted[filtered])
    return tokens


def _choose_filtered(p: torch.Tensor, u: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Among the likeliest tokens first, and once more among more of them for the rows that kept all that were sure.

    filters: [R, 3], top_k, top_p and min_p.
    """
    tokens = torch.empty(p.shape[0], dtype=torch.int64)
    left = torch.arange(p.shape[0])
    for width in _PREFIXES:
        values, ids, sure = _likeliest(p[left], width)
        tokens[left], kept = _pick(values, ids, u[left], filters[left])
        left = left[(filters[left, 0] > width) | (kept > sure)]
        if not len(left):
            return tokens
    values, ids = torch.sort(p[left], dim=-1, descending=True, stable=True)
    tokens[left] = _pick(values, ids, u[left], filters[left])[0]
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
    p: torch.Tensor, ids: torch.Tensor, u: torch.Tensor, filters: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """p, ids [R, K] in falling order. The tokens [R], and how many of the K were kept [R]."""
    width = p.shape[-1]
    top_k, top_p, min_p = filters.split(1, dim=1)
    limited = top_k > 0
    top_k = torch.where(limited, top_k, width).long()
    sums = _cumulate(p)
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
    """Running sums in float64."""
    return p.double().cumsum(-1)
