"""The fields that both completions endpoints share, as OpenAI names them, with vLLM's common extras."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from adaplex_server.http_api.schemas.fields import ConflictingFields, LogitBias, Only, Stop, StreamOptions, TokenIds
from adaplex_server.http_api.schemas.formats import ConstraintFields
from adaplex_server.service.limits import SamplingRequest


class SamplingFields(ConstraintFields):
    """Ranges are checked in `service.limits`, for HTTP and gRPC alike; here only types are."""

    model: str = Field(description="The base, or the adapter that is to answer.", max_length=1000)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias = None
    stop: Stop = None
    stop_token_ids: TokenIds = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = Field(None, description="Also answer with the token ids of prompt and text.")
    priority: int | None = Field(None, description="Lower is served first.")

    # Who asks and why: these change nothing about the answer.
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = Field(None, description="A hint; the prefix cache finds equal beginnings by itself.")
    service_tier: Literal["auto", "default"] | None = None

    store: Annotated[Any, Only(False)] = None
    skip_special_tokens: Annotated[Any, Only(True)] = None
    spaces_between_special_tokens: Annotated[Any, Only(True)] = None
    truncate_prompt_tokens: Annotated[Any, Only()] = None
    use_beam_search: Annotated[Any, Only(False)] = None
    length_penalty: Annotated[Any, Only(1.0, 1)] = None
    logits_processors: Annotated[Any, Only([])] = None
    bad_words: Annotated[Any, Only([])] = None

    @model_validator(mode="after")
    def _one_constraint(self) -> SamplingFields:
        if self.constraint is not None and self.ignore_eos:
            raise ConflictingFields("ignore_eos", "is not possible with a constraint, whose fulfilment ends the answer")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_usage_so_far(self) -> bool:
        """Whether every chunk of a stream tells it."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling(self, *, max_tokens: int | None, logprobs: int | None, **more: Any) -> SamplingRequest:
        """The same wishes in the service's words, untouched."""
        wishes = {
            "max_tokens": max_tokens,
            "min_tokens": self.min_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "include_stop": bool(self.include_stop_str_in_output),
            "ignore_eos": bool(self.ignore_eos),
            "n": self.n,
            "logprobs": logprobs,
            "prompt_logprobs": self.prompt_logprobs,
            "priority": self.priority,
            "constraint": self.constraint,
        }
        return SamplingRequest(**{**wishes, **more})
