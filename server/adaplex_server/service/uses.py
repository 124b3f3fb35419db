"""Counts the rows in flight of each name and revision, so that a revision is dropped only when nobody uses it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable


class Uses:
    """on_idle(revision) is called when the last use of a revision ends."""

    def __init__(self, on_idle: Callable[[str], None]) -> None:
        self._on_idle = on_idle
        self._names: Counter[str] = Counter()
        self._revisions: Counter[str] = Counter()

    def begin(self, name: str | None, revision: str) -> None:
        """A row (or, without a name, an installation) uses the revision from now on."""
        self._revisions[revision] += 1
        if name is not None:
            self._names[name] += 1

    def end(self, name: str | None, revision: str) -> None:
        """Called once for each `begin`."""
        if name is not None:
            _count_down(self._names, name)
        if _count_down(self._revisions, revision):
            self._on_idle(revision)

    def rows(self, name: str) -> int:
        """Rows of this name, of whatever revision."""
        return self._names[name]

    def busy(self, revision: str) -> bool:
        """Whether anybody uses it."""
        return self._revisions[revision] > 0


def _count_down(counts: Counter[str], key: str) -> bool:
    """True when it was the last; then the key is gone."""
    assert counts[key] > 0, f"{key} was released more often than taken"
    counts[key] -= 1
    if counts[key]:
        return False
    del counts[key]
    return True
