"""Tells tokens and their log-probabilities in the three forms that clients know."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from adaplex_server.http_api.schemas.answers import (
    ChatLogprobs,
    ContentLogprob,
    PromptLogprobs,
    PromptToken,
    TextLogprobs,
    TopLogprob,
)
from adaplex_server.service.text_codec import TextCodec
from adaplex_server.vocabulary import TokenLogprob

_LOWEST = -9999.0  # OpenAI's stand-in for a probability of zero, whose logarithm JSON cannot hold


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST


def chat_logprobs(text: TextCodec, tokens: Iterable[TokenLogprob]) -> ChatLogprobs:
    """Chat's form: a list of tokens with their alternatives."""
    content = []
    for token in tokens:
        chosen = _top(text, token.token_id, token.logprob)
        alternatives = [_top(text, *one) for one in token.top]
        content.append(ContentLogprob(chosen.token, chosen.logprob, chosen.bytes, alternatives))
    return ChatLogprobs(content)


def _top(text: TextCodec, token_id: int, logprob: float) -> TopLogprob:
    return TopLogprob(text.token_text(token_id), _finite(logprob), list(text.token_bytes(token_id)))


def prompt_logprobs(text: TextCodec, tokens: Sequence[TokenLogprob | None], most: int) -> PromptLogprobs:
    """vLLM's form: per prompt token a map from token id to its log-probability, with at most `most` alternatives."""
    told: PromptLogprobs = []
    for token in tokens:
        if token is None:
            told.append(None)
            continue
        ranks = {one: rank for rank, (one, _) in enumerate(token.top, start=1)}
        entries = {token.token_id: token.logprob, **dict(token.top[:most])}
        told.append(
            {
                str(one): PromptToken(_finite(logprob), ranks.get(one), text.token_text(one))
                for one, logprob in entries.items()
            }
        )
    return told


class TextLogprobsWriter:
    """OpenAI's older form, written piece by piece; owns the offset in the text of one choice.

    Two alternatives may have the same text. Their entry then holds the larger log-probability, so that comparing a
    token with the best alternative (as lm-eval does to see whether it was the greedy choice) stays right.
    """

    def __init__(self, text: TextCodec, most: int, offset: int = 0) -> None:
        """most: alternatives a token. offset: of the first token, below 0 if `text` does not show its characters."""
        self._text = text
        self._most = most
        self._offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, tokens: Iterable[TokenLogprob]) -> TextLogprobs:
        """The next generated tokens."""
        told = TextLogprobs([], [], [], [])
        for token in tokens:
            self._add(told, token.token_id, token)
        return told

    def write_prompt(self, ids: Sequence[int], tokens: Sequence[TokenLogprob | None]) -> TextLogprobs:
        """The prompt's tokens. Nothing predicts the first: its log-probability is null."""
        told = TextLogprobs([], [], [], [])
        for token_id, token in zip(ids, tokens, strict=True):
            self._add(told, token_id, token)
        return told

    def _add(self, told: TextLogprobs, token_id: int, token: TokenLogprob | None) -> None:
        told.text_offset.append(max(0, self._offset))
        told.tokens.append(self._name(token_id))
        told.token_logprobs.append(None if token is None else _finite(token.logprob))
        told.top_logprobs.append(None if token is None else self._alternatives(token))
        self._offset += len(self._decoder.decode(self._text.token_bytes(token_id)))

    def _alternatives(self, token: TokenLogprob) -> dict[str, float]:
        named: dict[str, float] = {}
        for token_id, logprob in (*token.top[: self._most], (token.token_id, token.logprob)):
            name = self._name(token_id)
            named[name] = max(named.get(name, _LOWEST), _finite(logprob))
        return named

    def _name(self, token_id: int) -> str:
        raw = self._text.token_bytes(token_id)
        try:
            return raw.decode() or self._text.token_text(token_id)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def joined(parts: Sequence[TextLogprobs]) -> TextLogprobs:
    """One TextLogprobs of several, in order."""
    return TextLogprobs(
        [one for part in parts for one in part.text_offset],
        [one for part in parts for one in part.token_logprobs],
        [one for part in parts for one in part.tokens],
        [one for part in parts for one in part.top_logprobs],
    )
