"""The one place for the ranges and defaults of what a client may ask for.

Both skins build their requests through it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaplex_adapters.errors import InvalidRequest, PromptTooLong
from adaplex_server.vocabulary import Constraint, SamplingParams

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARS = 512
MAX_STOP_CHARS_TOGETHER = 8192
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_PROMPT_CHARS = 4_000_000
MAX_MESSAGES = 10_000
SEED_SPACE = 1 << 63
GREEDY_BELOW = 1e-5
"""Temperatures below are 0: the likeliest token has all but certainty, and float32 would soon divide by zero."""
LEAST_REPETITION_PENALTY = 0.01
"""By less, a logit would be divided into what is no number."""


@dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """What a client wrote, untouched; None is 'not sent' and gets the default.

    max_tokens None: `default_max_tokens` of `build_sampling`, or the rest of the context. top_k: -1 and 0 are off.
    stop: one string or several. seed: any 64-bit integer, drawn when absent. logprobs, prompt_logprobs: how many
    alternatives (0: the chosen token alone). echo: the client gets its prompt back, so that max_tokens 0 makes sense.
    priority: lower is served first.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop: bool = False
    ignore_eos: bool = False
    n: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    constraint: Constraint | None = None
    priority: int | None = None


@dataclass(frozen=True)
class Sampling:
    """A `SamplingRequest` after its checks: what goes into a GenerateRequest."""

    params: SamplingParams
    n: int
    stop: tuple[str, ...]
    include_stop: bool
    priority: int


def _real(name: str, value: float | None, default: float, low: float, high: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # NaN
        raise InvalidRequest(f"{name} must be a number, got {value!r:.40}", param=name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must lie in [{low:g}, {high:g}], got {value!r:.40}", param=name)
    return float(value)


def _whole(name: str, value: int | None, default: int, low: int, high: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be a whole number, got {value!r:.40}", param=name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must lie in [{low}, {high}], got {value!r:.40}", param=name)
    return value


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Distinct stop strings in the order given."""
    if stop is None:
        return ()
    given = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(given) > MAX_STOPS:
        raise InvalidRequest(f"stop holds {len(given)} strings, at most {MAX_STOPS} are allowed", param="stop")
    for text in given:
        if not isinstance(text, str) or not text:
            raise InvalidRequest("each stop must be a string that is not empty", param="stop")
        if len(text) > MAX_STOP_CHARS:
            raise InvalidRequest(
                f"a stop string has {len(text)} characters, at most {MAX_STOP_CHARS} are allowed", param="stop"
            )
    together = sum(map(len, given))
    if together > MAX_STOP_CHARS_TOGETHER:
        raise InvalidRequest(
            f"the stop strings have {together} characters together, at most {MAX_STOP_CHARS_TOGETHER} are allowed",
            param="stop",
        )
    return tuple(dict.fromkeys(given))


def _token_ids(name: str, ids: Sequence[int] | None, most: int, vocab_size: int) -> tuple[int, ...]:
    if ids is None:
        return ()
    if len(ids) > most:
        raise InvalidRequest(f"{name} holds {len(ids)} entries, at most {most} are allowed", param=name)
    return tuple(_whole(name, token, 0, 0, vocab_size - 1) for token in ids)


def _bias(bias: Mapping[int, float] | None, vocab_size: int) -> dict[int, float]:
    if not bias:
        return {}
    ids = _token_ids("logit_bias", list(bias), MAX_LOGIT_BIAS, vocab_size)
    return {token: _real("logit_bias", bias[token], 0.0, -100.0, 100.0) for token in ids}


def resolve_max_tokens(wish: SamplingRequest, prompt_tokens: int, max_context: int, default: int | None) -> int:
    """How many tokens may be generated. An explicit wish must fit the context; a default is cut to what is left.

    Raises InvalidRequest for an empty prompt or a nonsensical wish, PromptTooLong with the counts.
    """
    if prompt_tokens < 1:
        raise InvalidRequest("the prompt is empty: send at least one token", param="prompt")
    left = max_context - prompt_tokens
    scoring = wish.echo or wish.prompt_logprobs is not None
    if wish.max_tokens is None:
        if left < 1:
            raise PromptTooLong(
                f"the prompt has {prompt_tokens} tokens, but the context of {max_context} has room for "
                f"{max_context - 1} and an answer; shorten the prompt by {1 - left}",
                param="prompt",
            )
        return left if default is None else min(default, left)
    asked = wish.max_tokens
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < (0 if scoring else 1):
        least = "0 or more" if scoring else "at least 1 (0 only with echo or prompt_logprobs)"
        raise InvalidRequest(f"max_tokens must be {least}, got {asked!r:.40}", param="max_tokens")
    if asked > left:
        raise PromptTooLong(
            f"the context holds {max_context} tokens, but {prompt_tokens} of the prompt and {asked!r:.40} of "
            f"max_tokens were asked for; send max_tokens of at most {max(left, 0)} or a shorter prompt",
            param="max_tokens" if left > 0 else "prompt",
        )
    return asked


def build_sampling(
    wish: SamplingRequest,
    *,
    prompt_tokens: int,
    max_context: int,
    vocab_size: int,
    default_max_tokens: int | None = None,
) -> Sampling:
    """Check every field against its range and fill in the defaults.

    default_max_tokens: None for the rest of the context (chat), 16 for OpenAI's completions. Raises InvalidRequest
    with the field in `param`, PromptTooLong when prompt and answer do not fit.
    """
    if wish.constraint is not None and wish.ignore_eos:
        raise InvalidRequest(
            "ignore_eos is not possible with a constraint, whose fulfilment ends the answer", param="ignore_eos"
        )
    max_tokens = resolve_max_tokens(wish, prompt_tokens, max_context, default_max_tokens)
    seed = secrets.randbits(62) if wish.seed is None else _whole("seed", wish.seed, 0, -SEED_SPACE, 2 * SEED_SPACE - 1)
    top_k = _whole("top_k", wish.top_k, 0, -1, 1 << 31)
    temperature = _real("temperature", wish.temperature, 1.0, 0.0, 2.0)
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=_whole("min_tokens", wish.min_tokens, 0, 0, max_tokens),
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_p=_real("top_p", wish.top_p, 1.0, 0.0, 1.0),
        top_k=min(max(top_k, 0), vocab_size),
        min_p=_real("min_p", wish.min_p, 0.0, 0.0, 1.0),
        seed=seed % SEED_SPACE,
        presence_penalty=_real("presence_penalty", wish.presence_penalty, 0.0, -2.0, 2.0),
        frequency_penalty=_real("frequency_penalty", wish.frequency_penalty, 0.0, -2.0, 2.0),
        repetition_penalty=_real("repetition_penalty", wish.repetition_penalty, 1.0, LEAST_REPETITION_PENALTY, 10.0),
        logit_bias=_bias(wish.logit_bias, vocab_size),
        stop_token_ids=_token_ids("stop_token_ids", wish.stop_token_ids, MAX_STOP_TOKEN_IDS, vocab_size),
        ignore_eos=wish.ignore_eos,
        logprobs=None if wish.logprobs is None else _whole("logprobs", wish.logprobs, 0, 0, MAX_LOGPROBS),
        prompt_logprobs=None
        if wish.prompt_logprobs is None
        else _whole("prompt_logprobs", wish.prompt_logprobs, 0, 0, MAX_LOGPROBS),
        constraint=wish.constraint,
    )
    return Sampling(
        params=params,
        n=_whole("n", wish.n, 1, 1, MAX_CHOICES),
        stop=_stops(wish.stop),
        include_stop=wish.include_stop,
        priority=_whole("priority", wish.priority, 0, -(1 << 31), (1 << 31) - 1),
    )
