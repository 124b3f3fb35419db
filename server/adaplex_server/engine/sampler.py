"""From logits to tokens and log-probabilities, for all rows of a step at once. Owns nothing but constants.

Only what some row needs is done: a greedy batch is one argmax. Rows never influence each other: every operation is
along the vocabulary, and which way a row takes depends on its own parameters and logits. On a GPU nothing here waits
for it: what was chosen is read from the device later, all of it at once (`Chosen`).

Notation: L rows of logits, R rows that choose a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adaplex_server.engine.adjustments import adjust, is_adjusted
from adaplex_server.engine.choice import choose_randomly
from adaplex_server.engine.chosen import Chosen, Logprobs, Scores
from adaplex_server.engine.row import Row, Work
from adaplex_server.model.upload import upload

_SCORE_SLICE = 64
"""Rows whose log-softmax is in memory at once while a prompt is scored."""


class Sampler:
    """eos: the model's own end tokens, which cannot be chosen before `min_tokens`."""

    def __init__(self, eos: frozenset[int]) -> None:
        self._eos = eos

    def wants_best(self, work: Sequence[Work]) -> bool:
        """Each work has one row of logits and wants its likeliest token, and nothing else."""
        return all(_wants_best(w, self._eos) for w in work)

    def __call__(self, logits: torch.Tensor, work: Sequence[Work], best: torch.Tensor | None = None) -> Chosen:
        """logits: [L, V] float32, of each work its last `logits` tokens, in the works' order. best: [L] int64, the
        likeliest tokens, or -1 where a logit is not finite, if the caller knows them.
        """
        starts, at = [], 0
        for w in work:
            starts.append(at)
            at += w.logits
        places = tuple(i for i, w in enumerate(work) if w.samples)
        scores = tuple(
            _score_prompt(logits[starts[i] : starts[i] + w.scores], w, i) for i, w in enumerate(work) if w.scores
        )
        if not places:
            none = torch.empty(0, dtype=torch.int64, device=logits.device)
            return Chosen(len(work), (), none, none, scores=scores)
        rows = [work[i].row for i in places]
        last = [starts[i] + work[i].logits - 1 for i in places]
        mine = _rows(logits, last)
        likeliest = None if best is None else _rows(best, last)
        # A sum along the row is finite exactly when every logit is: cheaper than a mask of the whole matrix.
        finite = torch.isfinite(mine.sum(-1)) if likeliest is None else likeliest >= 0
        tokens = self._choose(mine, rows, likeliest)
        told = tuple((i, r.sampling.logprobs) for i, r in enumerate(rows) if r.sampling.logprobs is not None)
        logprobs = None
        if told:
            index_of = [i for i, _ in told]
            logprobs = token_logprobs(_rows(mine, index_of), _rows(tokens, index_of), max(top for _, top in told))
        return Chosen(len(work), places, tokens, torch.where(finite, tokens, -1), told, logprobs, scores)

    def _choose(self, logits: torch.Tensor, rows: Sequence[Row], likeliest: torch.Tensor | None) -> torch.Tensor:
        """A token of each row of logits [R, V]; of a row that is not finite any. likeliest: as `best`, [R]."""
        adjusted = adjust(logits, rows, self._eos)
        random = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
        picked = choose_randomly(_rows(adjusted, random), [rows[i] for i in random]) if random else None
        if picked is not None and len(random) == len(rows):
            return picked
        if likeliest is None or adjusted is not logits:
            likeliest = adjusted.argmax(-1)
        tokens = likeliest.clamp(min=0)
        if picked is None:
            return tokens
        return tokens.index_copy(0, upload(random, torch.int64, logits.device), picked)


def _wants_best(work: Work, eos: frozenset[int]) -> bool:
    s = work.row.sampling
    greedy = work.samples and not work.scores and s.temperature == 0 and s.logprobs is None
    return greedy and not is_adjusted(work.row, eos)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> Logprobs:
    """Of each row of logits [R, V]: the log-probability of its token [R], and of the `top` likeliest."""
    total = logits.logsumexp(-1, keepdim=True)
    chosen = (logits.gather(-1, tokens[:, None]) - total)[:, 0]
    ids = _likeliest(logits, min(top, logits.shape[-1]))
    return Logprobs(tokens, chosen, ids, logits.gather(-1, ids) - total)


def _likeliest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """logits [R, V] float32: of each row the ids of the `count` likeliest tokens [R, count], lower ones first among
    equals. Which of several equals topk takes depends on how many are asked for, and that is the neighbours' wish too:
    so it is given whole numbers of which no two are equal, ordered as the logits are, then by id.
    """
    bits = logits.view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return order.bitwise_left_shift_(32).bitwise_or_(0xFFFFFFFF - ids).topk(count, dim=-1).indices


def _score_prompt(logits: torch.Tensor, work: Work, place: int) -> Scores:
    """The log-probabilities of the prompt tokens after each of these."""
    row = work.row
    targets = upload(row.tokens[work.start + 1 : work.start + 1 + work.scores], torch.int64, logits.device)
    slices = []
    for at in range(0, work.scores, _SCORE_SLICE):
        part = logits[at : at + _SCORE_SLICE]
        slices.append(token_logprobs(part, targets[at : at + _SCORE_SLICE], row.sampling.prompt_logprobs or 0))
    return Scores(place, torch.isfinite(logits.sum(-1)).all(), tuple(slices))


def _rows(values: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """These rows, without a copy when they are all."""
    if len(rows) == values.shape[0]:
        return values
    return values.index_select(0, upload(rows, torch.int64, values.device))
