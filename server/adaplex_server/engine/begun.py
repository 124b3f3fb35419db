"""The rows that have begun: which of them run, and which had to give up their pages and are to begin again.

Where a page is missing, the last row in order gives up all of its own and is computed again later (its text is kept, so
it goes on with the same words); the first row in order is never preempted, so there is always progress.

Owns the two lists and who is in which; a row is in one of them from `begin` to `end`. What a step does for a row that
runs is the `Scheduler`'s decision.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from adaplex_server.engine.leaving import Leaving
from adaplex_server.engine.row import Row
from adaplex_server.engine.row_pages import RowPages


class BegunRows:
    """pages: of rows that run. leaving: what becomes free by itself once the step in flight is settled."""

    def __init__(self, pages: RowPages, leaving: Leaving) -> None:
        self.preemptions = 0
        self._pages = pages
        self._leaving = leaving
        self._running: list[Row] = []
        self._preempted: list[Row] = []

    @property
    def running(self) -> Sequence[Row]:
        """Rows that hold pages, in their order."""
        return self._running

    @property
    def preempted(self) -> int:
        """Rows that are to begin again."""
        return len(self._preempted)

    def rows(self) -> list[Row]:
        """All of them."""
        return [*self._running, *self._preempted]

    def next_preempted(self) -> Row | None:
        """The first, in order, of those that are to begin again."""
        return min(self._preempted, key=lambda row: row.order, default=None)

    def begin(self, row: Row) -> bool:
        """The row runs from now on, for the first time or again. False if there are no pages for it: then nothing has
        changed.
        """
        # Whoever is preempted by a plan or an abandoned step begins in a later plan, and its steps are settled by then.
        assert not row.unsettled, "a row begins again while a step of its former life is in flight"
        # Some pages are left for running rows to grow.
        if not self._pages.begin(row, spare=len(self._running)):
            return False
        if row.state == "preempted":
            self._preempted.remove(row)
        row.state = "running"
        insort(self._running, row, key=lambda one: one.order)
        return True

    def grow(self, row: Row) -> bool:
        """A page for the row's next token, by preempting the last row if need be (perhaps this one: then False). False
        too if a page comes free by itself when the step in flight is settled: then the row stands back for one step.
        """
        if row.state != "running":
            return False
        if not self._pages.full(row):
            return True
        while self._pages.available < 1:
            if self._leaving.pages or any(other.remaining == 0 for other in self._running):
                return False
            victim = self._running[-1]
            self._preempt(victim)
            if victim is row:
                return False
        self._pages.extend(row)
        return True

    def preempt_last(self, count: int) -> None:
        """So many rows, the last in order, give up their pages."""
        for row in self._running[len(self._running) - count :]:
            self._preempt(row)

    def end(self, row: Row) -> None:
        """The row is in no list any more, and its pages are given back. Rows that have not begun are left alone."""
        if row.state == "running":
            self._running.remove(row)
            self._pages.release(row)
        elif row.state == "preempted":
            self._preempted.remove(row)

    def _preempt(self, row: Row) -> None:
        """Give up the row's pages but not its slot: slots are then never waited for by a row that has begun. A token
        that is being chosen for it is given up too, and chosen again.
        """
        self._running.remove(row)
        self._pages.release(row)
        row.computed = row.settled = row.ahead = 0
        if row.scoring:
            row.scores = [None]
        row.state = "preempted"
        self._preempted.append(row)
        self.preemptions += 1

    def check_integrity(self) -> None:
        """Each row is in the list that its state says, in order, and not too far ahead."""
        for state, rows in (("running", self._running), ("preempted", self._preempted)):
            assert all(row.state == state for row in rows), f"a row among the {state} is not {state}"
        assert self._running == sorted(self._running, key=lambda row: row.order), "running rows are out of order"
        for row in self._running:
            assert row.remaining > 0 or row.unsettled, "a row has nothing to compute"
            assert 0 <= row.ahead <= row.unsettled, "a row is too far ahead"
