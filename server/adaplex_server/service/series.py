"""The numbers of requests, as they are counted: for each label value, and for all requests together.

Plain numbers owned by the event loop, incremented directly by who counts; `metrics` writes them when somebody scrapes.
"""

from __future__ import annotations

from collections import Counter

from adaplex_adapters.errors import AdaplexError
from adaplex_server.service.histogram import (
    BETWEEN_TOKENS,
    FIRST_TOKEN,
    POWERS_OF_TWO,
    QUEUE,
    TOKENS,
    WHOLE_REQUEST,
    Histogram,
)

WELL = frozenset({"stop", "length"})
OURS = ("internal_error", "overloaded", "row_failed", "storage_failed", "unavailable")
"""Errors that alerts ask for. The base has them from the start: a counter that comes with its first error has not grown
for Prometheus.
"""


class RequestShapes:
    """Of all requests, whatever their names: how big they are and where a row's time goes."""

    __slots__ = ("answer_tokens", "between", "choices", "decode", "max_tokens", "prefill", "prompt_tokens")

    def __init__(self) -> None:
        self.prompt_tokens = Histogram(TOKENS)
        self.answer_tokens = Histogram(TOKENS)
        self.max_tokens = Histogram(TOKENS)
        self.choices = Histogram(POWERS_OF_TWO[:8])
        self.prefill = Histogram(WHOLE_REQUEST)
        self.decode = Histogram(WHOLE_REQUEST)
        self.between = Histogram(BETWEEN_TOKENS)

    def asked(self, prompt_tokens: int, choices: int, max_tokens: int) -> None:
        """A request was submitted."""
        self.prompt_tokens.observe(prompt_tokens)
        self.choices.observe(choices)
        self.max_tokens.observe(max_tokens)

    def row_ended(self, tokens: int, placed: float, first: float, last: float) -> None:
        """A row has ended. tokens: of its answer. placed, first, last: monotonic seconds at which it got its place in a
        step, and of its first and last token; 0 for what never was.
        """
        self.answer_tokens.observe(tokens)
        if placed and first:
            self.prefill.observe(max(0.0, first - placed))
        if first:
            self.decode.observe(last - first)
        if tokens > 1:
            self.between.observe((last - first) / (tokens - 1))


class Series:
    """Of one label value. shapes: shared by all of them."""

    __slots__ = (
        "between_tokens",
        "cached_tokens",
        "errors",
        "first_token",
        "generated_tokens",
        "label",
        "prompt_tokens",
        "queue",
        "requests",
        "shapes",
        "whole_request",
    )

    def __init__(self, label: str, shapes: RequestShapes) -> None:
        self.label = label
        self.shapes = shapes
        self.requests: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.queue = Histogram(QUEUE)
        self.first_token = Histogram(FIRST_TOKEN)
        self.between_tokens = Histogram(BETWEEN_TOKENS)
        self.whole_request = Histogram(WHOLE_REQUEST)

    def ended(self, outcome: str) -> None:
        """A request has ended. outcome: "stop", "length", "cancelled", or the code of an error."""
        self.requests[outcome] += 1
        if outcome not in WELL and outcome != "cancelled":
            self.errors[outcome] += 1


def reason_of(error: BaseException) -> str:
    """The `reason` label of a request that ended in an error."""
    return error.code or "error" if isinstance(error, AdaplexError) else "internal_error"
