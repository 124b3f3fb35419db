"""The request of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from adaplex_server.http_api.schemas.fields import ConflictingFields, Only
from adaplex_server.http_api.schemas.sampling import SamplingFields

Prompt = str | tuple[int, ...]


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """One or several prompts, each text or token ids. Written by hand: a prompt may hold 100,000 ids."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if not value:
        raise ValueError("must not be empty")
    if type(value[0]) is int:
        return (_token_ids(value),)
    if isinstance(value[0], str):
        if all(isinstance(one, str) for one in value):
            return tuple(value)
        raise ValueError("must not mix strings with anything else")
    return tuple(_token_ids(one) for one in value)


def _token_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, list) and all(type(one) is int for one in value):
        return tuple(value)
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")


_IDS = {"type": "array", "items": {"type": "integer"}}
_STRING = {"type": "string"}
Prompts = Annotated[
    Any,
    BeforeValidator(_prompts),
    WithJsonSchema({"anyOf": [_STRING, {"type": "array", "items": _STRING}, _IDS, {"type": "array", "items": _IDS}]}),
]


class CompletionRequest(SamplingFields):
    """Prompts to be continued by the model or adapter that `model` names."""

    prompt: Prompts = Field(description="Text or token ids, one prompt or several.")
    max_tokens: int | None = Field(None, description="Tokens of the answer, 16 if absent; 0 with echo only scores.")
    echo: bool | None = Field(None, description="Put the prompt before the answer, with its log-probabilities.")
    logprobs: int | None = None
    best_of: int | None = Field(None, description="Only the value of n: candidates are not ranked.")
    suffix: Annotated[Any, Only("")] = None
    add_special_tokens: bool | None = Field(
        None, description="Begin text prompts as the tokenizer would; true if absent."
    )

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (1 if self.n is None else self.n):
            raise ConflictingFields("best_of", "is not supported except with the value of n")
        if self.stream_options is not None and not self.stream:
            raise ConflictingFields("stream_options", "is only possible with stream: true")
        return self

    @property
    def prompt_alternatives(self) -> int | None:
        """How many alternatives a prompt token is told with: what was asked for, or what echo with logprobs needs."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((one for one in asked if one is not None), default=None)
