"""Changes to logits before a token is chosen: penalties, bias, and the ban of end tokens before min_tokens.

Penalties: CTRL's repetition penalty (Keskar et al. 2019) over prompt and generated tokens, then OpenAI's presence and
frequency penalties over generated ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from adaplex_server.engine.row import Row

_Index = tuple[torch.Tensor, torch.Tensor]


def adjust(logits: torch.Tensor, rows: Sequence[Row], eos: frozenset[int]) -> torch.Tensor:
    """logits [R, V] float32 as the rows want them; the same tensor if no row wants anything, else a changed copy."""
    penalized = [i for i, row in enumerate(rows) if _penalized(row)]
    biased = [(i, token, value) for i, row in enumerate(rows) for token, value in row.sampling.logit_bias.items()]
    banned = [(i, token) for i, row in enumerate(rows) for token in _banned(row, eos)]
    if not (penalized or biased or banned):
        return logits
    logits = logits.clone()
    if penalized:
        index = torch.tensor(penalized, device=logits.device)
        logits[index] = _penalize(logits[index], [rows[i] for i in penalized])
    if biased:
        values = torch.tensor([value for _, _, value in biased], dtype=logits.dtype, device=logits.device)
        logits.index_put_(_index([(i, token) for i, token, _ in biased], logits), values, accumulate=True)
    if banned:
        logits[_index(banned, logits)] = -torch.inf
    return logits


def _penalized(row: Row) -> bool:
    s = row.sampling
    return s.repetition_penalty != 1 or (row.generated > 0 and (s.presence_penalty != 0 or s.frequency_penalty != 0))


def _banned(row: Row, eos: frozenset[int]) -> Iterable[int]:
    if row.generated >= row.sampling.min_tokens:
        return ()
    return {*eos, *row.sampling.stop_token_ids}


def _penalize(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    counts = torch.zeros_like(logits)
    generated = [(i, token) for i, row in enumerate(rows) for token in row.tokens[row.prompt_length :]]
    if generated:
        ones = torch.ones(len(generated), dtype=counts.dtype, device=counts.device)
        counts.index_put_(_index(generated, logits), ones, accumulate=True)
    seen = counts > 0
    repeating = [(i, t) for i, row in enumerate(rows) if row.sampling.repetition_penalty != 1 for t in set(row.tokens)]
    if repeating:
        known = seen.clone()
        known[_index(repeating, logits)] = True
        factor = _column([row.sampling.repetition_penalty for row in rows], logits)
        logits = torch.where(known, torch.where(logits > 0, logits / factor, logits * factor), logits)
    presence = _column([row.sampling.presence_penalty for row in rows], logits)
    frequency = _column([row.sampling.frequency_penalty for row in rows], logits)
    return logits - presence * seen - frequency * counts


def _index(pairs: Sequence[tuple[int, int]], like: torch.Tensor) -> _Index:
    both = torch.tensor(pairs, device=like.device).T
    return both[0], both[1]


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
