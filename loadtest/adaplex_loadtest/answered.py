"""What became of one request, as its client saw it. Owns nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

WRONG = "wrong answer"


@dataclass
class Answered:
    """at: when it was due, in seconds of the run. late: how much later the generator sent it. first_token: seconds
    until it, None if none came. gaps: between events that bring tokens. error: what kind, None for none. Filled in by
    the client that reads the stream, then only read.
    """

    at: float
    model: str
    over: Literal["http", "grpc"]
    late: float = 0.0
    first_token: float | None = None
    gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    text: str = ""
    error: str | None = None
    retry_after: float | None = None

    @property
    def per_token(self) -> float:
        """Mean seconds between tokens; 0 for an answer of one."""
        if self.first_token is None or self.tokens < 2:
            return 0.0
        return (self.seconds - self.first_token) / (self.tokens - 1)

    @property
    def ended(self) -> float:
        """When, in seconds of the run."""
        return self.at + self.late + self.seconds

    def within(self, first_token: float, per_token: float) -> bool:
        """Answered rightly, and in time."""
        timely = self.first_token is not None and self.first_token <= first_token and self.per_token <= per_token
        return self.error is None and timely
