"""From logits to tokens and log-probabilities, for all rows of a step at once. Owns nothing but constants.

Only what some row needs is done: a greedy batch is one argmax. Rows never influence each other: every operation is
along the vocabulary, and which way a row takes depends on its own parameters and logits.

Notation: L rows of logits, R rows that choose a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adaplex_server.engine.adjustments import adjust, is_adjusted
from adaplex_server.engine.choice import choose_randomly
from adaplex_server.engine.row import Outcome, Work
from adaplex_server.vocabulary import TokenLogprob

_SCORE_SLICE = 64
"""Rows whose log-softmax is in memory at once while a prompt is scored."""


class Sampler:
    """eos: the model's own end tokens, which cannot be chosen before `min_tokens`."""

    def __init__(self, eos: frozenset[int]) -> None:
        self._eos = eos

    def take_best(self, best: torch.Tensor, work: Sequence[Work]) -> list[Outcome] | None:
        """best: [R] int64, the likeliest token of each work's only row of logits, or -1 where a logit is not finite.
        None if that is not all that some work wants.
        """
        if not all(_wants_best(w, self._eos) for w in work):
            return None
        return [Outcome(token) if token >= 0 else Outcome(failed=True) for token in best.tolist()]

    def __call__(self, logits: torch.Tensor, work: Sequence[Work]) -> list[Outcome]:
        """logits: [L, V] float32, of each work its last `logits` tokens, in the works' order. An outcome a work."""
        starts, at = [], 0
        for w in work:
            starts.append(at)
            at += w.logits
        choosing = [(i, starts[i] + w.logits - 1) for i, w in enumerate(work) if w.samples]
        outcomes = [Outcome() for _ in work]
        if choosing:
            chosen = self._choose(_rows(logits, [row for _, row in choosing]), [work[i] for i, _ in choosing])
            for (i, _), outcome in zip(choosing, chosen, strict=True):
                outcomes[i] = outcome
        for i, w in enumerate(work):
            if w.scores and not outcomes[i].failed:
                scores = _score_prompt(logits[starts[i] : starts[i] + w.scores], w)
                done = outcomes[i]
                outcomes[i] = (
                    Outcome(failed=True) if scores is None else Outcome(done.token, False, done.logprob, tuple(scores))
                )
        return outcomes

    def _choose(self, logits: torch.Tensor, work: Sequence[Work]) -> list[Outcome]:
        rows = [w.row for w in work]
        # A sum along the row is finite exactly when every logit is: cheaper than a mask of the whole matrix.
        finite = torch.isfinite(logits.sum(-1))
        adjusted = adjust(logits, rows, self._eos)
        tokens = adjusted.argmax(-1)
        random = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
        if random:
            index = torch.tensor(random, device=logits.device)
            tokens[index] = choose_randomly(_rows(adjusted, random), [rows[i] for i in random])
        told = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
        logprobs: dict[int, TokenLogprob] = {}
        if told:
            most = max(rows[i].sampling.logprobs or 0 for i in told)
            found = token_logprobs(_rows(logits, told), _rows(tokens, told), most)
            logprobs = {i: _at_most(one, rows[i].sampling.logprobs or 0) for i, one in zip(told, found, strict=True)}
        ids = torch.where(finite, tokens, -1).tolist()
        return [
            Outcome(failed=True) if token < 0 else Outcome(token, False, logprobs.get(i)) for i, token in enumerate(ids)
        ]


def _wants_best(work: Work, eos: frozenset[int]) -> bool:
    s = work.row.sampling
    greedy = work.samples and not work.scores and s.temperature == 0 and s.logprobs is None
    return greedy and not is_adjusted(work.row, eos)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> list[TokenLogprob]:
    """Of each row of logits [L, V]: the log-probability of its token [L], and of the `top` likeliest."""
    total = logits.logsumexp(-1, keepdim=True)
    chosen = (logits.gather(-1, tokens[:, None]) - total)[:, 0].tolist()
    if not top:
        return [TokenLogprob(token, value) for token, value in zip(tokens.tolist(), chosen, strict=True)]
    values, ids = logits.topk(min(top, logits.shape[-1]), dim=-1)
    pairs = zip((values - total).tolist(), ids.tolist(), strict=True)
    best = [tuple(sorted(zip(i, v, strict=True), key=lambda pair: (-pair[1], pair[0]))) for v, i in pairs]
    return [TokenLogprob(*all_) for all_ in zip(tokens.tolist(), chosen, best, strict=True)]


def _score_prompt(logits: torch.Tensor, work: Work) -> list[TokenLogprob] | None:
    """The log-probabilities of the prompt tokens after each of these; None if a number is not finite."""
    row, scores = work.row, []
    targets = torch.tensor(row.tokens[work.start + 1 : work.start + 1 + work.scores], device=logits.device)
    for at in range(0, work.scores, _SCORE_SLICE):
        part = logits[at : at + _SCORE_SLICE]
        if not torch.isfinite(part.sum(-1)).all():
            return None
        scores += token_logprobs(part, targets[at : at + _SCORE_SLICE], row.sampling.prompt_logprobs or 0)
    return scores


def _at_most(one: TokenLogprob, top: int) -> TokenLogprob:
    return one if len(one.top) <= top else TokenLogprob(one.token_id, one.logprob, one.top[:top])


def _rows(values: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """These rows, without a copy when they are all."""
    return values if len(rows) == values.shape[0] else values[torch.tensor(rows, device=values.device)]
