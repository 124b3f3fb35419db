"""What tracing needs of a request, and what a tracer is to the service. Without one, nothing of it is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from adaplex_server.vocabulary import GenerateRequest


class RowTimes(Protocol):
    """Monotonic seconds at which a row got its place in a step, had its first and its last token, and ended; 0 for what
    has not been. tokens: of its answer so far.
    """

    placed: float
    first: float
    last: float
    ended: float
    tokens: int


class Trace(Protocol):
    """Of one request. Neither method may raise."""

    def end(self, outcome: str, rows: Sequence[RowTimes]) -> None:
        """The request has ended; called once. outcome: "stop", "length", "cancelled" or the code of an error."""


class Tracer(Protocol):
    """Makes the trace of each request that was admitted."""

    def begin(self, request: GenerateRequest, began: float) -> Trace:
        """began: monotonic seconds of its submission."""

    def close(self) -> None:
        """Send what is left."""
