"""How many rows are under way, and whether more may begin.

Owns their counts by model and the mean time of an answered request, of which a retry hint is made.
"""

from __future__ import annotations

from collections import Counter

from adaplex_adapters.errors import Overloaded

_LONGEST = 60.0
_SHORTEST = 1.0
_OF_REQUESTS = 0.1


class Room:
    """A row's way: `check`, `begin`, and `end` when the engine is done with it. total: rows of all models."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self.total = 0
        self._seconds = 1.0

    def check(self, model: str, rows: int, places: int) -> None:
        """Raises Overloaded if the server is full, unless the model has less than its share of the places: the engine's
        queue will then take the place of another one, whose share is larger.
        """
        if self.total + rows <= places:
            return
        share = places // len({*self._rows, model})
        if self._rows[model] + rows <= share:
            return
        hint = min(_LONGEST, max(_SHORTEST, round(self._seconds / 2, 1)))
        what = f"{self.total} rows are under way and {places} is the limit; try again in {hint:g} s"
        raise Overloaded(what, retry_after=hint)

    def begin(self, model: str) -> None:
        """A row of this model is submitted."""
        self._rows[model] += 1
        self.total += 1

    def end(self, model: str) -> None:
        """One that was begun has ended in the engine."""
        self.total -= 1
        self._rows[model] -= 1
        if not self._rows[model]:
            del self._rows[model]

    def answered(self, seconds: float) -> None:
        """A request was answered after so long."""
        self._seconds += _OF_REQUESTS * (seconds - self._seconds)
