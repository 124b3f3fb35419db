"""How long rows take, and from it how long one that comes now would wait for its turn."""

from __future__ import annotations

_MEMORY = 1 / 32
_LONGEST = 60.0
_SHORTEST = 0.1


class Pace:
    """Owns the mean time that rows have run, the last few dozen weighing most."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._rows = 0.0

    def note(self, seconds: float) -> None:
        """A row has ended by itself, so long after it began."""
        self._seconds += seconds - _MEMORY * self._seconds
        self._rows += 1 - _MEMORY * self._rows

    def wait(self, ahead: int, running: int) -> float:
        """Expected seconds until a row begins that has so many before it in the queue, while `running` rows run
        (Little's law); 0 as long as nothing is known.
        """
        mean = self._seconds / self._rows if self._rows else 0.0
        return (ahead + 1) * mean / max(running, 1)

    def retry_after(self, wait: float) -> float:
        """What a client is told that would wait so long: to come back when about half of those before it have begun."""
        return min(max(wait / 2, _SHORTEST), _LONGEST)
