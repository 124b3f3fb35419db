"""The bounded queue of rows that have not begun: fair between adapters.

Within a priority (lower value first, as in vLLM) the revisions take turns, whatever the length of each one's line;
within a revision it is first come, first served. Owns the order, nothing else.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from adaplex_server.engine.row import Row

_Lines = OrderedDict[str | None, deque[Row]]


class WaitingRows:
    """A line for each (priority, revision); the first revision of a priority's lines is the next to be served."""

    def __init__(self) -> None:
        self._levels: dict[int, _Lines] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        return (row for _, lines in sorted(self._levels.items()) for line in lines.values() for row in line)

    def priorities(self) -> list[int]:
        """Priorities that have rows, most urgent first."""
        return sorted(self._levels)

    def add(self, row: Row) -> None:
        """To the end of its revision's line."""
        self._levels.setdefault(row.priority, OrderedDict()).setdefault(row.revision, deque()).append(row)
        self._count += 1

    def next(self, priority: int, eligible: Callable[[str | None], bool]) -> Row | None:
        """The row whose turn it is, among the revisions that are eligible now. It stays in the queue."""
        for revision, line in self._levels.get(priority, {}).items():
            if eligible(revision):
                return line[0]
        return None

    def remove(self, row: Row, served: bool = False) -> None:
        """Take the row out; if it was served, its revision goes to the end of the turn."""
        lines = self._levels[row.priority]
        line = lines[row.revision]
        line.remove(row)
        self._count -= 1
        if served:
            lines.move_to_end(row.revision)
        if not line:
            del lines[row.revision]
        if not lines:
            del self._levels[row.priority]

    def heads(self) -> dict[str, Row]:
        """The first row, in the rows' order, of each adapter revision that has any."""
        found: dict[str, Row] = {}
        for _, lines in sorted(self._levels.items()):
            for revision, line in lines.items():
                if revision is not None and revision not in found:
                    found[revision] = line[0]
        return found
