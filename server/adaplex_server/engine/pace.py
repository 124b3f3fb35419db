"""How fast rows come and go, and from it how long one that comes now would wait for its turn."""

from __future__ import annotations

_OF_ROWS = 1 / 32
_OF_WAITS = 1 / 64
_LEAST_BIAS, _MOST_BIAS = 0.5, 4.0
_OF_STEPS = 1 / 32
_LONGEST = 60.0
_SHORTEST = 0.1


class Pace:
    """Owns the mean number of steps that a row takes and the mean time of a step, both of the last ones; and by how
    much longer the last rows have waited than was expected: those that come later to a shorter line go first.

    The time of a step follows a change of load within some dozens of steps, over which steps with and without prompts
    are averaged; that of whole rows would follow it only when they have ended, which is too late for those who come
    meanwhile.
    """

    def __init__(self) -> None:
        self._steps = 0.0
        self._rows = 0.0
        self._seconds = 0.0
        self._planned_steps = 0.0
        self._planned: float | None = None
        # A second each to begin with, so that the first rows that waited a little longer change little.
        self._waited = self._foreseen = 1.0
        self._promised: dict[int, float] = {}

    def plan(self, now: float, busy: bool) -> None:
        """A step is planned; busy: it has work."""
        if self._planned is not None:
            self._seconds += now - self._planned - _OF_STEPS * self._seconds
            self._planned_steps += 1 - _OF_STEPS * self._planned_steps
        self._planned = now if busy else None

    def end(self, steps: int) -> None:
        """A row has ended by itself, after so many steps."""
        self._steps += steps - _OF_ROWS * self._steps
        self._rows += 1 - _OF_ROWS * self._rows

    def promise(self, row: int, expected: float) -> None:
        """A row is queued that is expected to wait for so long; then `waited` or `forget`. What was said while nothing
        was known was no promise.
        """
        if expected > 0:
            self._promised[row] = expected / self._bias

    def waited(self, row: int, seconds: float) -> None:
        """A row has waited for so long; what was promised to it is compared, if anything was."""
        promised = self._promised.pop(row, None)
        if promised is not None:
            self._waited += seconds - _OF_WAITS * self._waited
            self._foreseen += promised - _OF_WAITS * self._foreseen

    def forget(self, row: int) -> None:
        """The row has ended without its turn."""
        self._promised.pop(row, None)

    @property
    def _bias(self) -> float:
        return min(_MOST_BIAS, max(_LEAST_BIAS, self._waited / self._foreseen))

    def wait(self, ahead: int, running: int) -> float:
        """Expected seconds until a row begins that has so many before it in the queue, while `running` rows run
        (Little's law); 0 as long as nothing is known.
        """
        if not self._rows or not self._planned_steps:
            return 0.0
        row_seconds = self._steps / self._rows * self._seconds / self._planned_steps
        return self._bias * (ahead + 1) * row_seconds / max(running, 1)

    def retry_after(self, wait: float) -> float:
        """What a client is told that would wait so long: to come back when about half of those before it have begun."""
        return min(max(wait / 2, _SHORTEST), _LONGEST)
