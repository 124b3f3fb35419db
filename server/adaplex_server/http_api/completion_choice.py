"""Writes one choice of /v1/completions, whole or piece by piece: echo, log-probabilities, finish."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from adaplex_server.http_api.choices import Choice, finish_reason
from adaplex_server.http_api.schemas.answers import PromptLogprobs, TextChoice, TextLogprobs
from adaplex_server.http_api.schemas.completions import CompletionRequest, Prompt
from adaplex_server.http_api.tokens import TextLogprobsWriter, joined, prompt_logprobs
from adaplex_server.service.text_codec import TextCodec
from adaplex_server.vocabulary import Finish


class ChoiceWriter:
    """Owns what the client has been told of one choice: whether the prompt, and how far the offsets have come."""

    def __init__(
        self, text: TextCodec, body: CompletionRequest, prompt: Prompt, ids: Sequence[int], index: int
    ) -> None:
        self._text = text
        self._body = body
        self._ids = ids
        self._index = index
        self._first = True
        self._echo = ""
        hidden = 0  # characters of tokens that the tokenizer has put before the client's text
        if body.echo:
            shown = text.decode(ids, skip_special=False)
            self._echo = prompt if isinstance(prompt, str) else shown
            hidden = max(0, len(shown) - len(self._echo))
        self._logprobs = None if body.logprobs is None else TextLogprobsWriter(text, body.logprobs, -hidden)

    def write(self, new: Choice, end: Finish | None) -> TextChoice:
        """What is new: on the first call with the prompt, if it was asked for; with `end` the reason of the end."""
        first, self._first = self._first, False
        return TextChoice(
            index=self._index,
            text=(self._echo if first else "") + "".join(new.text),
            logprobs=self._next_logprobs(new, end, first),
            finish_reason=None if end is None else finish_reason(end),
            stop_reason=None if end is None else end.matched_stop,
            prompt_logprobs=self._of_prompt(new) if first else UNSET,
            token_ids=new.token_ids if self._body.return_token_ids else UNSET,
            prompt_token_ids=list(self._ids) if first and self._body.return_token_ids else UNSET,
        )

    def _next_logprobs(self, new: Choice, end: Finish | None, first: bool) -> TextLogprobs | None:
        if self._logprobs is None:
            return None
        parts = []
        if first and self._body.echo and new.prompt_logprobs is not None:
            parts.append(self._logprobs.write_prompt(self._ids, new.prompt_logprobs))
        last = () if end is None or end.stop_logprob is None else (end.stop_logprob,)
        parts.append(self._logprobs.write((*new.logprobs, *last)))
        told = joined(parts)
        return told if told.tokens or first else None

    def _of_prompt(self, new: Choice) -> PromptLogprobs | UnsetType:
        most = self._body.prompt_logprobs
        if most is None or new.prompt_logprobs is None:
            return UNSET
        return prompt_logprobs(self._text, new.prompt_logprobs, most)
