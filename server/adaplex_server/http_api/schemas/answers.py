"""What completions endpoints answer. One struct is both the bytes on the wire and its schema in /openapi.json.

Fields that OpenAI leaves out when they do not apply are UNSET here; fields that it sends as null are None.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(Struct, frozen=True):
    """Prompt tokens that came from the prefix cache."""

    cached_tokens: int


class Usage(Struct, frozen=True):
    """Tokens of the request; a prompt counts once, whatever n."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptToken(Struct, frozen=True):
    """An alternative at a prompt position, as vLLM tells it. rank 1 is the likeliest; null beyond the alternatives."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]

# ---- /v1/chat/completions --------------------------------------------------------------------------------------------


class TopLogprob(Struct, frozen=True):
    """An alternative; `bytes` tells tokens apart whose text is not whole characters."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(Struct, frozen=True):
    """One token of the answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """Log-probabilities of the answer's tokens, in their order."""

    content: list[ContentLogprob]
    refusal: None = None


class CalledFunction(Struct, frozen=True):
    """arguments: JSON as text."""

    name: str
    arguments: str


class ToolCall(Struct, frozen=True):
    """The client is to call this and to send the result as a message of role 'tool' with the call's id."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class AnswerMessage(Struct, frozen=True):
    """The assistant's turn. content: null where there are tool calls alone."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    """One of the n answers. stop_reason: the stop string or token id that ended it, if one of the request's own did."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, frozen=True):
    """The whole answer to a chat request."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class DeltaFunction(Struct, frozen=True):
    """More of a call: its name comes first, then its arguments in pieces."""

    arguments: str
    name: str | UnsetType = UNSET


class DeltaToolCall(Struct, frozen=True):
    """What is new of the call of this number; id and type come with the name."""

    index: int
    function: DeltaFunction
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatDelta(Struct, frozen=True):
    """What is new; `role` is in the first chunk of a choice alone."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[DeltaToolCall] | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True):
    """What is new in one choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(Struct, frozen=True):
    """One event of a stream. usage: left out unless include_usage, then null but in the last, which has no choices."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


# ---- /v1/completions -------------------------------------------------------------------------------------------------


class TextLogprobs(Struct, frozen=True):
    """OpenAI's older form: four lists, one entry a token. A prompt's first token has no prediction: null.

    text_offset counts characters of `text`. A token that is not whole characters is written bytes:\\xNN. When an end or
    stop token ended the text it is the last entry, although `text` does not hold it.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TextChoice(Struct, frozen=True):
    """One answer to one prompt: index = prompt number * n + answer number. In a stream, what is new of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(Struct, frozen=True):
    """The whole answer to a completions request, or one event of its stream."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | UnsetType | None = UNSET
