"""Changes to logits before a token is chosen: penalties, bias, the ban of end tokens before min_tokens, and what a
constraint allows.

Penalties: CTRL's repetition penalty (Keskar et al. 2019) over prompt and generated tokens, then OpenAI's presence and
frequency penalties over generated ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch

from adaplex_server.engine.guide import Guide
from adaplex_server.engine.row import Row
from adaplex_server.model.upload import upload

_Index = tuple[torch.Tensor, torch.Tensor]


def adjust(logits: torch.Tensor, rows: Sequence[Row], eos: frozenset[int]) -> torch.Tensor:
    """logits [R, V] float32 as the rows want them; the same tensor if no row wants anything, else a changed copy."""
    penalized = [i for i, row in enumerate(rows) if _penalized(row)]
    biased = [(i, token, value) for i, row in enumerate(rows) for token, value in row.sampling.logit_bias.items()]
    guided = {i: row for i, row in enumerate(rows) if _guided(row)}
    banned = [(i, token) for i, row in enumerate(rows) if i not in guided for token in _banned(row, eos)]
    if not (penalized or biased or banned or guided):
        return logits
    logits = logits.clone()
    if penalized:
        _penalize(logits, {i: rows[i] for i in penalized})
    if biased:
        values = upload([value for _, _, value in biased], logits.dtype, logits.device)
        logits.index_put_(_index([(i, token) for i, token, _ in biased], logits), values, accumulate=True)
    if banned:
        logits.index_put_(_index(banned, logits), logits.new_full((1,), -torch.inf))
    if guided:
        _constrain(logits, guided, eos)
    return logits


def is_adjusted(row: Row, eos: frozenset[int]) -> bool:
    """Whether `adjust` would change this row's logits."""
    return _penalized(row) or _guided(row) or bool(row.sampling.logit_bias) or bool(_banned(row, eos))


def _penalized(row: Row) -> bool:
    s = row.sampling
    return s.repetition_penalty != 1 or (row.generated > 0 and (s.presence_penalty != 0 or s.frequency_penalty != 0))


def _guided(row: Row) -> bool:
    """A row that has ended has a wasted place, and its guide is done."""
    return row.guide is not None and row.state != "ended"


def _constrain(logits: torch.Tensor, rows: dict[int, Row], eos: frozenset[int]) -> None:
    """Make impossible, in place, what the constraints of these rows do not allow."""
    guides = []
    for row in rows.values():
        assert row.guide is not None
        row.guide.advance(row.tokens[row.prompt_length :])
        guides.append(row.guide)
    vocab_size = logits.shape[-1]
    allowed = Guide.allowed(guides, [_banned(row, eos) for row in rows.values()], vocab_size)
    forbidden = _bits(upload(allowed, torch.uint8, logits.device))[:, :vocab_size].logical_not_()
    if len(rows) == len(logits):
        logits.masked_fill_(forbidden, -torch.inf)
    else:
        places = upload([*rows], torch.int64, logits.device)
        logits.index_copy_(0, places, logits.index_select(0, places).masked_fill_(forbidden, -torch.inf))


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """packed [R, W] uint8: its bits, lowest first, [R, W * 8] bool."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> places & 1).flatten(1).bool()


def _banned(row: Row, eos: frozenset[int]) -> Collection[int]:
    if row.generated >= row.sampling.min_tokens:
        return ()
    return {*eos, *row.sampling.stop_token_ids}


def _penalize(logits: torch.Tensor, rows: dict[int, Row]) -> None:
    """Change, in place, the logits of the tokens that a penalty of their row touches, and no others."""
    touched: list[tuple[int, int]] = []
    factors: list[float] = []
    addends: list[float] = []
    for i, row in rows.items():
        s, counts = row.sampling, Counter(row.tokens[row.prompt_length :])
        tokens = counts.keys() if s.repetition_penalty == 1 else {*row.tokens[row.virtual :]}
        touched += [(i, token) for token in tokens]
        factors += [s.repetition_penalty] * len(tokens)
        addends += [-(s.presence_penalty * (token in counts) + s.frequency_penalty * counts[token]) for token in tokens]
    index = _index(touched, logits)
    factor = upload(factors, logits.dtype, logits.device)
    values = logits[index]
    values = torch.where(values > 0, values / factor, values * factor)
    logits[index] = values + upload(addends, logits.dtype, logits.device)


def _index(pairs: Sequence[tuple[int, int]], like: torch.Tensor) -> _Index:
    both = upload(pairs, torch.int64, like.device).T
    return both[0], both[1]
