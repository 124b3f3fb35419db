"""The one internal vocabulary that HTTP and gRPC both speak: what is asked, and what comes back.

Everything here is frozen. Wire schemas (OpenAI JSON, protobuf) are other things and are translated at the edge;
messages between the processes are in `adaplex_server.engine.messages` and reuse `SamplingParams` and `FinishReason`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from adaplex_server.caller import ANYONE, Caller

FinishReason = Literal["stop", "length", "error", "cancelled"]


class Constraint(msgspec.Struct, frozen=True):
    """What the text of an answer must be, whole.

    kind "json": text is a JSON schema; "regex": a regular expression; "lark": a grammar in llguidance's variant of
    Lark's language (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
    """

    kind: Literal["json", "regex", "lark"]
    text: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How a row's tokens are chosen. Defaults are OpenAI's; each range is checked once, in `service.limits`.

    temperature 0 is greedy (ties: lowest token id). top_k 0 and min_p 0 are off. seed fixes the row's randomness
    whatever the batch; the service fills it in when the client sent none. Penalties follow OpenAI (presence, frequency:
    subtracted from logits, over generated tokens) and CTRL (repetition: divided/multiplied, over prompt and generated
    tokens). logit_bias: token id -> addend in [-100, 100]. logprobs: None, or how many top alternatives per generated
    token (0: the chosen one only; at most 20). prompt_logprobs: the same for each prompt token but the first.
    Log-probabilities are of the raw model distribution. stop_token_ids end the row (the stop token is not part of the
    text); ignore_eos keeps going over the model's own end tokens; until min_tokens are generated, no end or stop token
    can be chosen. constraint: only tokens that keep to it can be chosen, and end tokens only where it is fulfilled; an
    answer that can only end ends, whatever min_tokens is.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One completion asked for, by whichever protocol.

    model: the name as the client gave it (the base or an adapter). prompt: token ids, already templated. n: independent
    answers (choice i samples with seed + i). stop: strings that end the text and are never emitted (unless
    include_stop). deadline: seconds from now until the request is worthless, None for no limit. request_id: appears in
    logs and answers. caller: who asks, for their scope and allowance.
    """

    request_id: str
    model: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    deadline: float | None = None
    priority: int = 0
    caller: Caller = ANYONE


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token with its natural-log probability and the top alternatives, best first: (id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What a client of choice `index` has not been sent yet: complete characters only; stop strings already held back.

    token_ids are the tokens whose text this delta completes (may be empty while a multi-byte character is pending).
    prompt_logprobs come once, on the first delta of a choice, when asked for (first entry None: the first token has no
    prediction).
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """The one final message of choice `index`. Errors are raised instead, never sent as a Finish.

    matched_stop: the stop string or stop token id that ended the text, None otherwise. cached_tokens: prompt tokens
    taken from the prefix cache. stop_logprob: of the end or stop token that ended the row, when log-probabilities were
    asked for (it is in no Delta).
    """

    index: int
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    matched_stop: str | int | None = None
    stop_logprob: TokenLogprob | None = None
