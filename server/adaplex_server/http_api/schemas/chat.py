"""The request of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, WithJsonSchema, model_validator

from adaplex_server.http_api.schemas.fields import ConflictingFields, Only, RequestModel
from adaplex_server.http_api.schemas.sampling import SamplingFields
from adaplex_server.http_api.schemas.tools import NamedTool, Tool, ToolCall
from adaplex_server.service.limits import MAX_LOGPROBS
from adaplex_server.service.tool_use import MAX_TOOLS

MAX_MESSAGES = 4096


def _joined_text(value: Any) -> str:
    """A string, or text parts; parts are joined by line breaks, as vLLM does for templates that take strings."""
    if isinstance(value, str):
        return value
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

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = Field(None, description="Given to the chat template, which may use it.", max_length=256)
    refusal: Annotated[Any, Only()] = None
    annotations: Annotated[Any, Only([])] = None
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only()] = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _whole(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ConflictingFields("tool_calls", "belongs to messages of role 'assistant'")
        if self.tool_call_id is not None and self.role != "tool":
            raise ConflictingFields("tool_call_id", "belongs to messages of role 'tool'")
        if self.content is None and not self.tool_calls:
            raise ConflictingFields("content", "must be a string or a list of text parts; only tool calls go without")
        return self

    def templated(self) -> dict[str, Any]:
        """As chat templates expect it; OpenAI's newer word 'developer' is 'system' there."""
        role = "system" if self.role == "developer" else self.role
        named: dict[str, Any] = {"name": self.name} if self.name is not None else {}
        if self.tool_calls:
            named["tool_calls"] = [call.templated() for call in self.tool_calls]
        if self.tool_call_id is not None:
            named["tool_call_id"] = self.tool_call_id
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

    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="With 'required' or a tool's name the answer is calls that keep to the tools' schemas."
    )
    parallel_tool_calls: bool | None = Field(None, description="Whether 'required' allows more than one call.")
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
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ConflictingFields("tools", "holds two functions of one name")
        choice = self.tool_choice
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ConflictingFields("tool_choice", "names a function that is not among the tools")
        if choice == "required" and not names:
            raise ConflictingFields("tool_choice", "asks for a call, and there are no tools")
        if names and choice != "none" and self.constraint is not None:
            raise ConflictingFields("response_format", "and tools exclude each other; send tool_choice 'none'")

    @property
    def answer_tokens(self) -> int | None:
        """The wanted length of the answer, by whichever name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives a token is told with; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None
