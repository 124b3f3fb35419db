"""What a step has chosen, from the device to the host: tensors until they are read, then an outcome for each work.

The host reads one small tensor of token ids a step, and what rows wanted besides. Nothing here waits: `download` copies
to pinned memory in the stream's order, and `outcomes` is called on that when the step's event has passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from adaplex_server.engine.row import Outcome
from adaplex_server.model.upload import download
from adaplex_server.vocabulary import TokenLogprob


@dataclass(frozen=True)
class Logprobs:
    """For R tokens: ids [R] int64 and their values [R]; and of each row the likeliest, ids and values [R, top]."""

    tokens: torch.Tensor
    values: torch.Tensor
    top_ids: torch.Tensor
    top_values: torch.Tensor

    def download(self) -> Logprobs:
        """The same in host memory (see `upload.download`)."""
        return Logprobs(download(self.tokens), download(self.values), download(self.top_ids), download(self.top_values))

    def told(self) -> Iterator[TokenLogprob]:
        """Row by row; from host memory."""
        chosen = zip(self.tokens.tolist(), self.values.tolist(), strict=True)
        for (token, value), ids, values in zip(chosen, self.top_ids.tolist(), self.top_values.tolist(), strict=True):
            best = sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
            yield TokenLogprob(token, value, tuple(best))


@dataclass(frozen=True)
class Scores:
    """Of one work's prompt tokens, in slices; finite: [] bool, whether all numbers are."""

    place: int
    finite: torch.Tensor
    slices: tuple[Logprobs, ...]


@dataclass(frozen=True)
class Chosen:
    """What a step has chosen, before the host knows it.

    count: works of the step. places: those that choose a token, R of them. ids: [R] int64 on the device, the chosen
    tokens, for a row that failed any token. best: [R] int64, the same, but -1 for a row that failed. told: which of
    the R want log-probabilities, and how many of the likeliest; logprobs: theirs.
    """

    count: int
    places: tuple[int, ...]
    ids: torch.Tensor
    best: torch.Tensor
    told: tuple[tuple[int, int], ...] = ()
    logprobs: Logprobs | None = None
    scores: tuple[Scores, ...] = ()

    def download(self) -> Chosen:
        """The same in host memory, but for `ids`; see `upload.download`."""
        scores = tuple(
            Scores(one.place, download(one.finite), tuple(part.download() for part in one.slices))
            for one in self.scores
        )
        logprobs = None if self.logprobs is None else self.logprobs.download()
        return Chosen(self.count, self.places, self.ids, download(self.best), self.told, logprobs, scores)

    def outcomes(self) -> list[Outcome]:
        """An outcome for each work; from host memory."""
        found = [Outcome() for _ in range(self.count)]
        logprobs: dict[int, TokenLogprob] = {}
        if self.logprobs is not None:
            pairs = zip(self.told, self.logprobs.told(), strict=True)
            logprobs = {i: _at_most(one, top) for (i, top), one in pairs}
        for i, (place, token) in enumerate(zip(self.places, self.best.tolist(), strict=True)):
            found[place] = Outcome(failed=True) if token < 0 else Outcome(token, False, logprobs.get(i))
        for scores in self.scores:
            one = found[scores.place]
            if not one.failed and bool(scores.finite):
                told = tuple(told for part in scores.slices for told in part.told())
                found[scores.place] = Outcome(one.token, False, one.logprob, told)
            else:
                found[scores.place] = Outcome(failed=True)
        return found


def _at_most(one: TokenLogprob, top: int) -> TokenLogprob:
    return one if len(one.top) <= top else TokenLogprob(one.token_id, one.logprob, one.top[:top])
