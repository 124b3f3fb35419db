"""The request of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, WithJsonSchema, model_validator

from adaplex_server.http_api.schemas.fields import ConflictingFields, Only, RequestModel
from adaplex_server.http_api.schemas.sampling import SamplingFields
from adaplex_server.service.limits import MAX_LOGPROBS

MAX_MESSAGES = 4096


def _joined_text(value: Any) -> str:
    """A string, or text parts; parts are joined by line breaks, as vLLM does for templates that take strings."""
    if isinstance(value, str):
        return value
    if value is None:
        raise ValueError("must be a string or a list of text parts; a message without content is not supported")
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or a list of text parts that is not empty")
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"part {i} must be an object of type 'text', the only type that this server reads")
        if not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise ValueError(f"part {i} must have a string 'text' and nothing else")
        texts.append(part["text"])
    return "\n".join(texts)


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
Content = Annotated[
    str,
    BeforeValidator(_joined_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART, "minItems": 1}]}),
]


class ChatMessage(RequestModel):
    """One turn. An assistant message may be sent back as it was received: fields that are null there pass."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = Field(None, description="Given to the chat template, which may use it.", max_length=256)
    refusal: Annotated[Any, Only()] = None
    annotations: Annotated[Any, Only([])] = None
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only()] = None
    tool_calls: Annotated[Any, Only([])] = None

    def templated(self) -> dict[str, str]:
        """As chat templates expect it; OpenAI's newer word 'developer' is 'system' there."""
        role = "system" if self.role == "developer" else self.role
        named = {"name": self.name} if self.name is not None else {}
        return {"role": role, "content": self.content, **named}


class ChatCompletionRequest(SamplingFields):
    """A conversation to be continued by the model or adapter that `model` names."""

    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: int | None = Field(None, description="The old name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(
        None, description="Tokens of the answer; the rest of the context if absent."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    tools: Annotated[Any, Only([])] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, Only(True, False)] = None
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    prediction: Annotated[Any, Only()] = None
    moderation: Annotated[Any, Only()] = None
    reasoning_effort: Annotated[Any, Only("none")] = None
    verbosity: Annotated[Any, Only("medium")] = None
    web_search_options: Annotated[Any, Only()] = None
    prompt_cache_options: Annotated[Any, Only()] = None
    prompt_cache_retention: Annotated[Any, Only("in_memory")] = None
    echo: Annotated[Any, Only(False)] = None
    add_generation_prompt: Annotated[Any, Only(True)] = None
    continue_final_message: Annotated[Any, Only(False)] = None
    add_special_tokens: Annotated[Any, Only(False)] = None
    chat_template: Annotated[Any, Only()] = None
    chat_template_kwargs: Annotated[Any, Only({})] = None
    documents: Annotated[Any, Only([])] = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ConflictingFields("top_logprobs", "needs logprobs to be true")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise ConflictingFields("max_tokens", "contradicts max_completion_tokens; send one of them")
        if self.stream_options is not None and not self.stream:
            raise ConflictingFields("stream_options", "is only possible with stream: true")
        return self

    @property
    def answer_tokens(self) -> int | None:
        """The wanted length of the answer, by whichever name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives a token is told with; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None
