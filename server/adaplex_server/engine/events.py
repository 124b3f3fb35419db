"""What clients must be told of rows, collected until the end of a step."""

from __future__ import annotations

from adaplex_adapters.errors import AdaplexError
from adaplex_server.engine.messages import RowEnd, RowToken
from adaplex_server.engine.row import Outcome, Row
from adaplex_server.vocabulary import FinishReason, TokenLogprob


class Events:
    """Owns the tokens and ends that have not been taken yet."""

    def __init__(self) -> None:
        self._tokens: list[RowToken] = []
        self._ends: list[RowEnd] = []

    def take(self) -> tuple[list[RowToken], list[RowEnd]]:
        """What has happened since the last call."""
        events = (self._tokens, self._ends)
        self._tokens, self._ends = [], []
        return events

    def token(self, row: Row, token: int, outcome: Outcome) -> None:
        """The row has one token more, already among its tokens."""
        first = row.generated == 1
        scores = row.scores if first and row.sampling.prompt_logprobs is not None else None
        if first:
            told = RowToken(row.id, token, outcome.logprob, scores, row.cached_tokens, row.began)
        else:
            told = RowToken(row.id, token, outcome.logprob)
        self._tokens.append(told)

    def end(self, row: Row, reason: FinishReason, stop: tuple[int | None, TokenLogprob | None]) -> None:
        """The row has ended without an error. stop: the token that ended it, which was not told as a token."""
        whole = len(row.scores) == row.prompt_length - row.virtual
        scores = row.scores if row.generated == 0 and whole else None
        began = row.began if row.generated == 0 else 0.0
        self._ends.append(
            RowEnd(row.id, reason, stop_token=stop[0], prompt_logprobs=scores, stop_logprob=stop[1], began=began)
        )

    def error(self, row: int, error: AdaplexError) -> None:
        """The row of this id has ended with an error."""
        name = type(error).__name__
        self._ends.append(RowEnd(row, "error", error=name, message=error.message, retry_after=error.retry_after))
