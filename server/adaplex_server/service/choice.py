"""One answer of a request, from the engine's tokens to what its client is sent."""

from __future__ import annotations

from adaplex_server.engine.messages import RowEnd, RowToken
from adaplex_server.service.detokenizer import Detokenizer
from adaplex_server.service.stops import StopMatcher
from adaplex_server.vocabulary import Delta, Finish, FinishReason, SamplingParams, TokenLogprob


class Choice:
    """Text, stop strings and counts of choice `index`.

    A token belongs to the delta that holds its first character; tokens of a stop string that is not sent belong to
    none, though they are counted. matched: whether a stop string has ended the text; then nothing more is to be
    pushed.
    """

    __slots__ = (
        "_cached",
        "_detokenizer",
        "_generated",
        "_matcher",
        "_pending",
        "_prompt_logprobs",
        "_prompt_tokens",
        "_sampling",
        "_seen",
        "_sent",
        "_text",
        "index",
        "matched",
    )

    def __init__(
        self,
        index: int,
        prompt_tokens: int,
        sampling: SamplingParams,
        detokenizer: Detokenizer,
        matcher: StopMatcher | None,
    ) -> None:
        self.index = index
        self.matched = False
        self._prompt_tokens = prompt_tokens
        self._sampling = sampling
        self._detokenizer = detokenizer
        self._matcher = matcher
        self._generated = 0
        self._cached = 0
        self._prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        # Positions are in characters of the whole text: tokens not yet sent with where their text begins.
        self._pending: list[tuple[int, RowToken]] = []
        self._seen = 0
        self._sent = 0
        self._text = ""

    def push(self, token: RowToken) -> None:
        """Take one generated token."""
        self._generated += 1
        if self._generated == 1:
            self._cached = token.cached_tokens
            if token.prompt_logprobs is not None:
                self._prompt_logprobs = tuple(token.prompt_logprobs)
        piece = self._detokenizer.push(token.token)
        self._pending.append((self._seen, token))
        self._take(piece)

    def _take(self, piece: str) -> None:
        """Add text that has been made; what might begin a stop string stays with the matcher."""
        self._seen += len(piece)
        matcher = self._matcher
        # Until min_tokens there is no end, so no stop string is looked for either.
        if matcher is None or self._generated < self._sampling.min_tokens:
            self._text += piece
        else:
            self._text += matcher.push(piece)
            self.matched = matcher.matched is not None

    def delta(self, *, last: bool = False) -> Delta | None:
        """What can be sent now, if there is any text. A token that has none yet waits for it: whether it is told beside
        a stop string must not depend on which tokens came together. With `last` it waits no longer.
        """
        text = self._text
        if not text:
            return None
        self._text = ""
        self._sent += len(text)
        if last or not self._pending or self._pending[-1][0] < self._sent:
            tokens, self._pending = self._pending, []
        else:
            tokens = [pair for pair in self._pending if pair[0] < self._sent]
            self._pending = self._pending[len(tokens) :]
        return self._made(text, tokens)

    def finish(self, end: RowEnd | None) -> tuple[Delta | None, Finish]:
        """The last delta, if anything is left, and the end. end: the engine's word, None when a stop string matched."""
        if not self.matched:
            self._take(self._detokenizer.flush())
        if not self.matched and self._matcher:
            self._text += self._matcher.flush()
        last = self.delta(last=not self.matched)
        if last is None and not self.matched and self._pending:
            tokens, self._pending = self._pending, []
            last = self._made("", tokens)
        if end is not None and end.prompt_logprobs is not None:
            last = Delta(index=self.index, text="", prompt_logprobs=tuple(end.prompt_logprobs))
        elif last is None and self._prompt_logprobs is not None:
            last = self._made("", [])
        return last, self._finish(end)

    def _made(self, text: str, tokens: list[tuple[int, RowToken]]) -> Delta:
        if self._sampling.logprobs is None and self._prompt_logprobs is None:
            return Delta(index=self.index, text=text, token_ids=tuple([token.token for _, token in tokens]))
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return Delta(
            index=self.index,
            text=text,
            token_ids=tuple([token.token for _, token in tokens]),
            logprobs=tuple([token.logprob for _, token in tokens if token.logprob is not None]),
            prompt_logprobs=prompt_logprobs,
        )

    def _finish(self, end: RowEnd | None) -> Finish:
        """An end or stop token counts as generated, though it has no text."""
        reason: FinishReason = "stop"
        matched: str | int | None = None
        counted, stop_logprob = self._generated, None
        if self.matched:
            matched = self._matcher.matched if self._matcher else None
        elif end is not None:
            reason, stop_logprob = end.reason, end.stop_logprob
            if end.stop_token is not None:
                counted += 1
                matched = end.stop_token if end.stop_token in self._sampling.stop_token_ids else None
        return Finish(
            index=self.index,
            reason=reason,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=counted,
            cached_tokens=self._cached,
            matched_stop=matched,
            stop_logprob=stop_logprob,
        )
