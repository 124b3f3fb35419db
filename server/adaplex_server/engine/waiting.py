"""The bounded queue of rows that have not begun: fair between adapters, by tokens.

Within a priority (lower value first, as in vLLM) the revisions take turns by deficit round robin (Shreedhar and
Varghese, 1995) with three differences. A row's cost is not known when it begins, as nobody knows its answer's length:
what its prompt costs is taken from the revision's credit at its beginning, each generated token when it is there, and
credit may fall below zero (a surplus round robin). A quantum is one token times the weight, so that no revision begins
two rows where another one's turn has come; the rounds until somebody has credit are counted at once. And the credit is
the revision's over all priorities, as long as it has a row, so that a queue that is short but never empty does not
forget its debts.

Within a revision it is first come, first served. A full queue is shared too (McKenney's stolen buffers, 1990): whoever
comes then takes the last place of the longest line, if their own is shorter. Owns the order and the credits, nothing
else.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from adaplex_server.engine.row import Row

_Lines = OrderedDict[str | None, deque[Row]]


@dataclass
class _Account:
    """credit: tokens that the revision may still take in this round. rows: that wait or run."""

    credit: float
    weight: float
    rows: int = 0


class WaitingRows:
    """A line for each (priority, revision). A revision has an account from its first row's `add` to its last's `leave`.

    A row's way: `add`, then `served` when it begins and `charge` as it grows, or nothing of this; and `leave` at its
    end, wherever it is.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _Lines] = {}
        self._accounts: dict[str | None, _Account] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        return (row for _, lines in sorted(self._levels.items()) for line in lines.values() for row in line)

    def priorities(self) -> list[int]:
        """Priorities that have rows, most urgent first."""
        return sorted(self._levels)

    def add(self, row: Row) -> None:
        """To the end of its revision's line. Its weight is from now on its revision's."""
        self._levels.setdefault(row.priority, OrderedDict()).setdefault(row.revision, deque()).append(row)
        self._count += 1
        account = self._accounts.setdefault(row.revision, _Account(row.weight, row.weight))
        account.weight = row.weight
        account.rows += 1

    def next(self, priority: int, eligible: Callable[[str | None], bool]) -> Row | None:
        """The row whose turn it is, among the revisions that are eligible now. It stays in the queue."""
        candidates: list[_Account] = []
        for revision, line in self._levels.get(priority, {}).items():
            if eligible(revision):
                account = self._accounts[revision]
                if account.credit > 0:
                    return line[0]
                candidates.append(account)
        if not candidates:
            return None
        self._begin_rounds(candidates)
        return self.next(priority, eligible)

    def ahead(self, row: Row) -> int:
        """About how many rows begin before this one, which is to come or has just come: whatever is more urgent, its
        own line, and as many of each other line.
        """
        more_urgent = sum(len(line) for p, lines in self._levels.items() if p < row.priority for line in lines.values())
        lines = self._levels.get(row.priority, _Lines())
        mine = len(lines[row.revision]) if row.revision in lines else 0
        return more_urgent + sum(min(len(line), mine + 1) for line in lines.values())

    def giving_way(self, row: Row) -> Row | None:
        """Whose place a row that is to come takes when the queue is full: the last one of the longest line among the
        least urgent, if that is less urgent or longer than its own would be. None: its own is the longest.
        """
        if not self._levels:
            return None
        priority = max(self._levels)
        lines = self._levels[priority]
        longest = max(lines.values(), key=len)
        mine = len(lines.get(row.revision, ()))
        gives_way = priority > row.priority or (priority == row.priority and len(longest) > mine + 1)
        return longest[-1] if gives_way else None

    def served(self, row: Row, cost: int) -> None:
        """Take the row out, as it begins; cost: tokens of its prompt that are to be computed."""
        lines = self._levels[row.priority]
        self._remove(row)
        self.charge(row, cost)
        if row.revision in lines and self._accounts[row.revision].credit <= 0:
            lines.move_to_end(row.revision)

    def charge(self, row: Row, tokens: int) -> None:
        """A row that has begun has taken so many tokens."""
        self._accounts[row.revision].credit -= tokens

    def leave(self, row: Row) -> None:
        """The row has ended; it is taken out if it still waits."""
        if row.state == "waiting":
            self._remove(row)
        account = self._accounts[row.revision]
        account.rows -= 1
        if not account.rows:
            del self._accounts[row.revision]

    def heads(self) -> dict[str, Row]:
        """The first row, in the rows' order, of each adapter revision that has any."""
        found: dict[str, Row] = {}
        for _, lines in sorted(self._levels.items()):
            for revision, line in lines.items():
                if revision is not None and revision not in found:
                    found[revision] = line[0]
        return found

    def _begin_rounds(self, candidates: list[_Account]) -> None:
        """As many rounds as it takes until one of the candidates has credit. A round pays off everybody's debts, also
        those of rows that run; who does not wait for a turn saves nothing up.
        """
        rounds = min(math.floor(-account.credit / account.weight) + 1 for account in candidates)
        for account in self._accounts.values():
            account.credit = min(account.credit + rounds * account.weight, account.weight)

    def _remove(self, row: Row) -> None:
        lines = self._levels[row.priority]
        line = lines[row.revision]
        line.remove(row)
        self._count -= 1
        if not line:
            del lines[row.revision]
        if not lines:
            del self._levels[row.priority]

    def check_integrity(self) -> None:
        """Every line has rows, and every row an account."""
        lines = [line for lines in self._levels.values() for line in lines.values()]
        assert all(lines) and sum(map(len, lines)) == self._count, "the queue's count is wrong"
        for revision, account in self._accounts.items():
            waiting = sum(len(lines[revision]) for lines in self._levels.values() if revision in lines)
            assert account.rows >= max(1, waiting), "an account has fewer rows than wait"
