"""The rows of the next step. Pure logic: no torch, and the time is an argument.

Owns every `Row` from `submit` to its end, and with it the row's pages and pin. A step is `place` (at most one adapter
to bring to the device), `plan` (which tokens of which rows are computed), the forward, and `commit` for each piece of
work, or `abandon` for all of it; what clients must be told is collected until `take_events`.

A step may be planned while the one before is in flight: planned, but not committed. Its rows count as advanced: a row
whose token is being chosen decodes on with a token that only the device knows, unless that token is the last one that
it may have. What the step in flight writes or reads stays held until it is committed, even if its row ends or is
preempted before (`Leaving`); the outcome is then nobody's. So nothing is planned on a guess: a row that has ended
without the planner's knowledge (a stop token, not finite) has one wasted place in the next step, whose outcome is
dropped, and no other row can see it. Steps are committed in the order in which they were planned.

Rows that run keep running: decoding rows first, then prefills in chunks, then new rows while pages last (`BegunRows`
knows who gives up pages for whom).
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator

from adaplex_adapters.errors import AdaplexError, DeadlineExceeded, InvalidRequest, Overloaded, RowFailed, Unavailable
from adaplex_server.engine.adapter_slots import AdapterSlots, Reservation
from adaplex_server.engine.admission import refusal, too_late
from adaplex_server.engine.begun import BegunRows
from adaplex_server.engine.events import Events
from adaplex_server.engine.guide import Guide
from adaplex_server.engine.leaving import Leaving
from adaplex_server.engine.limits import Limits
from adaplex_server.engine.messages import RowEnd, RowToken, Submit
from adaplex_server.engine.pace import Pace
from adaplex_server.engine.placement import Placement
from adaplex_server.engine.prefix_cache import PrefixCache
from adaplex_server.engine.prompt_share import prompt_share
from adaplex_server.engine.row import Outcome, Row, Work, work_on
from adaplex_server.engine.row_pages import RowPages
from adaplex_server.engine.waiting import WaitingRows
from adaplex_server.vocabulary import FinishReason, TokenLogprob

_LEAST_STEP = 16
"""Tokens below which a step is not made smaller."""


class Scheduler:
    """Built from its parts, whose states it alone changes, but for `slots.remove` when a revision is dropped."""

    def __init__(self, limits: Limits, cache: PrefixCache, slots: AdapterSlots, placement: Placement) -> None:
        self.limits = limits
        self.max_context = min(limits.max_context, cache.available * limits.page_size)
        self.hit_tokens = 0
        self.query_tokens = 0
        self.step_tokens = limits.max_step_tokens
        self._leaving = Leaving(cache, slots)
        self._pages = RowPages(cache, self._leaving, limits.page_size)
        self._slots = slots
        self._placement = placement
        self._rows: dict[int, Row] = {}
        self._waiting = WaitingRows()
        self._begun = BegunRows(self._pages, self._leaving)
        self._arrivals = 0
        self._events = Events()
        self._pace = Pace()

    # ---- what comes from outside -------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Rows that have not begun, and rows that were preempted."""
        return len(self._waiting) + self._begun.preempted

    @property
    def running(self) -> int:
        """Rows that hold pages."""
        return len(self._begun.running)

    @property
    def preemptions(self) -> int:
        """How often a row has had to give up its pages."""
        return self._begun.preemptions

    def next_order(self, priority: int = 0) -> tuple[int, int]:
        """The place in the order of whatever arrives now."""
        self._arrivals += 1
        return (priority, self._arrivals)

    def submit(self, message: Submit, now: float, guide: Guide | None = None) -> None:
        """Queue a row, or end it at once when it cannot be served."""
        sampling, virtual = message.sampling, message.virtual_tokens
        length = virtual + len(message.prompt)
        row = Row(
            id=message.row,
            tokens=[*range(-1, -virtual - 1, -1), *message.prompt],
            prompt_length=length,
            sampling=sampling,
            revision=message.revision,
            deadline=message.deadline,
            priority=message.priority,
            arrival=self.next_order()[1],
            max_tokens=min(sampling.max_tokens, self.max_context - length),
            virtual=virtual,
            weight=message.weight,
            tenant=message.tenant,
            queued=now,
            guide=guide,
            scores=[None] if sampling.prompt_logprobs is not None else [],
        )
        self._rows[row.id] = row
        error = refusal(message, self.max_context, self.limits.vocab_size)
        if error is not None:
            self.fail(row, error)
        elif sampling.max_tokens == 0 and not row.scoring:
            self._end(row, "length")
        elif (overload := self._overload(row, now)) is not None:
            self.fail(row, overload)
        else:
            self._waiting.add(row)
            row.state = "waiting"

    def cancel(self, row_id: int) -> None:
        """End the row now; unknown ones have just ended."""
        row = self._rows.get(row_id)
        if row is not None:
            self._end(row, "cancelled")

    def refuse(self, message: Submit, error: AdaplexError) -> None:
        """End a row that is not to be queued at all."""
        self._events.error(message.row, error)

    def fail(self, row: Row, error: AdaplexError) -> None:
        """End the row with an error."""
        self._end(row, "error", error=error)

    def fail_revision(self, revision: str, error: AdaplexError) -> None:
        """End every row of a revision that cannot be served."""
        for row in self.rows_of(revision):
            self.fail(row, error)

    def rows_of(self, revision: str) -> list[Row]:
        """Rows of a revision that have not ended."""
        return [row for row in self._rows.values() if row.revision == revision]

    def next_deadline(self) -> float | None:
        """The earliest deadline of any row."""
        return min((row.deadline for row in self._rows.values() if row.deadline is not None), default=None)

    def take_events(self) -> tuple[list[RowToken], list[RowEnd]]:
        """What has happened since the last call."""
        return self._events.take()

    # ---- a step ------------------------------------------------------------------------------------------------------

    def wanted(self) -> list[str]:
        """Revisions that rows or loads wait for and that are not on the device."""
        return self._placement.wanted(self._first_orders())

    def absent(self) -> list[str]:
        """Revisions to be read into host memory, most urgent first."""
        return self._placement.absent(self._first_orders())

    def place(self) -> Reservation | None:
        """An adapter to be written to its slot before the next `plan`, if one is wanted and has room."""
        first = self._first_orders()
        return self._placement.place(first, room=bool(first) and self._places > 0)

    def plan(self, now: float) -> list[Work]:
        """The work of the next step, in the order of the rows; empty when nothing can run."""
        self._expire(now)
        preemptions, budget, scores = self.preemptions, self.step_tokens, self.limits.max_scores
        decoding = [row for row in self._begun.running if row.remaining == 1][:budget]
        work = {row: work_on(row, 1) for row in decoding if self._begun.grow(row)}
        budget -= len(work)
        if self.limits.few_tokens:
            budget = prompt_share(self.limits.few_tokens, len(work), budget, self._prompt_tokens(work))
        if self.preemptions == preemptions:
            self._admit(budget, now)
        for row in self._begun.running if budget > 0 else ():
            if row in work or self._pages.full(row):
                continue
            count = min(row.remaining, budget, scores if row.scoring else budget)
            if count > 0:
                work[row] = work_on(row, count)
                budget -= work[row].count
                scores -= work[row].scores
        planned = sorted(work.values(), key=lambda w: w.row.order)
        for one in planned:
            one.row.computed += one.count
            one.row.ahead += one.samples
            one.row.unsettled += 1
        self._pace.plan(now, busy=bool(planned))
        return planned

    def commit(self, work: Work, outcome: Outcome, now: float) -> None:
        """The step has computed this work: note it, and end the row if it is done."""
        row = work.row
        row.unsettled -= 1
        if row.state != "running":
            # Ended or preempted since; a preempted one does not begin again before this.
            self._leaving.settle(row, outcome.failed)
            return
        if outcome.failed:
            self._pages.condemn(row)
            what = (
                "the numbers of this row are not finite (its adapter's weights may be too large); nothing else is hurt"
            )
            self.fail(row, RowFailed(what))
            return
        if row.guide is not None and row.guide.error:
            self.fail(row, InvalidRequest(row.guide.error))
            return
        row.settled = work.start + work.count
        row.scores.extend(outcome.scores)
        self._pages.keep(row)
        if outcome.token is not None:
            row.ahead -= 1
            self._accept(row, outcome.token, outcome, now)
        elif row.max_tokens == 0 and row.settled == row.length:
            self._end(row, "length", now=now)

    def abandon(self, work: list[Work]) -> None:
        """The device had no memory for this work, which was planned last and was not done: ask for less of it next
        time. The last half of the rows give up their pages; a row alone gets smaller steps; one that fits in no step
        ends.
        """
        for one in work:
            row = one.row
            row.unsettled -= 1
            if row.state == "running":
                row.computed = one.start
                row.ahead -= one.samples
            else:
                # What was computed of it is not known to be finite.
                self._leaving.settle(row, failed=True)
        count = self.running // 2
        self._begun.preempt_last(count)
        if count == 0 and self.step_tokens > _LEAST_STEP:
            self.step_tokens //= 2
        elif count == 0 and self.running:
            what = "the device has no memory for this request now"
            self.fail(self._begun.running[0], Unavailable(what, retry_after=5.0))

    def recover(self) -> None:
        """Memory has sufficed for a while: steps may grow again."""
        self.step_tokens = min(self.step_tokens * 2, self.limits.max_step_tokens)

    # ---- inside ------------------------------------------------------------------------------------------------------

    @property
    def _places(self) -> int:
        """Rows that may begin now: one that only waits for its last token has no place in the next step."""
        return self.limits.max_rows - sum(row.remaining > 0 for row in self._begun.running)

    def _prompt_tokens(self, decoding: Container[Row]) -> Iterator[int]:
        """Of each row that computes its prompt, or might begin: the tokens that it still has to compute."""
        yield from (row.remaining for row in self._begun.running if row not in decoding)
        yield from (row.remaining for row in itertools.islice(self._waiting, max(0, self._places)))

    def _overload(self, row: Row, now: float) -> Overloaded | None:
        """Why a row is better refused at once than queued, if it is. Where the queue is full, another one may be that
        instead, whose line is longer.
        """
        waiting, free = len(self._waiting), self._free_places()
        if waiting < free:
            return None
        # The free places are as good as taken, by those that wait already.
        wait = self._pace.wait(self._waiting.ahead(row) - free, self.running + free)
        left = None if row.deadline is None else row.deadline - now
        what = too_late(wait, self.limits.max_wait, left)
        if what is not None:
            return Overloaded(what, retry_after=self._pace.retry_after(wait))
        self._pace.promise(row.id, wait)
        if waiting < self.limits.max_waiting + free:
            return None
        full = f"{waiting} requests wait already, and that is the limit; retry later"
        other = self._waiting.giving_way(row)
        if other is None:
            return Overloaded(full, retry_after=self._pace.retry_after(wait))
        longer = self._pace.wait(self._waiting.ahead(other) - free, self.running + free)
        self.fail(other, Overloaded(full, retry_after=self._pace.retry_after(longer)))
        return None

    def _free_places(self) -> int:
        """Places in the next step that nobody has yet: who is about to take one does not count as waiting."""
        return max(0, self._places - self._begun.preempted)

    def _first_orders(self) -> dict[str, tuple[int, int]]:
        return {revision: row.order for revision, row in self._waiting.heads().items()}

    def _expire(self, now: float) -> None:
        if self.limits.max_wait is not None:
            self._expire_waits(now, self.limits.max_wait)
        for row in [r for r in self._rows.values() if r.deadline is not None and r.deadline <= now]:
            where = "generating" if row.generated else "in prefill" if row.state == "running" else "in the queue"
            self.fail(row, DeadlineExceeded(f"the deadline passed while the request was {where}"))

    def _expire_waits(self, now: float, longest: float) -> None:
        """End rows that were expected to begin earlier: now it would be at the cost of those that can be in time."""
        for row in [row for row in self._waiting if now - row.queued > longest]:
            self._pace.waited(row.id, now - row.queued)
            what = f"this request has waited for {longest:g} s, and that is the limit; retry later"
            self.fail(row, Overloaded(what, retry_after=self._pace.retry_after(longest)))

    def _admit(self, budget: int, now: float) -> None:
        """Begin rows while there are places, pages and tokens for them. A row that finds no pages holds up the others,
        or it might wait for ever.
        """
        places = self._places if self.waiting else 0
        while places > 0 and budget > 0:
            row = self._next_row()
            if row is None:
                return
            first = row.state == "waiting"
            if not self._begun.begin(row):
                return
            if first:
                self._served(row, now)
            budget -= row.remaining
            places -= 1

    def _next_row(self) -> Row | None:
        preempted = self._begun.next_preempted()
        for priority in self._waiting.priorities():
            if preempted is not None and preempted.priority <= priority:
                return preempted
            row = self._waiting.next(priority, self._placement.may_begin)
            if row is not None:
                return row
        return preempted

    def _served(self, row: Row, now: float) -> None:
        """The row has begun for the first time: it is out of the queue, and has its adapter until its end."""
        self._waiting.served(row, row.remaining)
        row.began = now
        self._pace.waited(row.id, now - row.queued)
        row.cached_tokens = max(0, row.computed - row.virtual)
        row.slot = None if row.revision is None else self._slots.pin(row.revision)
        self.hit_tokens += row.computed
        self.query_tokens += row.prompt_length

    def _accept(self, row: Row, token: int, outcome: Outcome, now: float) -> None:
        self._waiting.charge(row, 1)
        sampling = row.sampling
        if token in sampling.stop_token_ids or (token in self.limits.eos and not sampling.ignore_eos):
            self._end(row, "stop", stop=(token, outcome.logprob), now=now)
            return
        row.tokens.append(token)
        self._events.token(row, token, outcome)
        if row.generated >= row.max_tokens:
            self._end(row, "length", now=now)

    def _end(
        self,
        row: Row,
        reason: FinishReason,
        *,
        error: AdaplexError | None = None,
        stop: tuple[int | None, TokenLogprob | None] = (None, None),
        now: float | None = None,
    ) -> None:
        """The row's one final word; everything it holds is given back."""
        del self._rows[row.id]
        self._begun.end(row)
        if row.state != "new":
            self._waiting.leave(row)
        row.state = "ended"
        self._pace.forget(row.id)
        if row.slot is not None:
            self._leaving.unpin(row)
        if error is not None:
            self._events.error(row.id, error)
        else:
            self._events.end(row, reason, stop)
        if now is not None:
            self._pace.end(row.generated + 1)

    def held_pages(self) -> list[list[int]]:
        """The pages of every running row, and of steps in flight (for the pool's audit)."""
        return [*(row.pages for row in self._begun.running), *self._leaving.pages]

    def check_integrity(self) -> None:
        """Every row is in one place, holds what that place allows, and pins add up."""
        waiting, begun = list(self._waiting), self._begun.rows()
        assert all(row.state == "waiting" for row in waiting), "a row is in a wrong place"
        assert {row.id for row in (*waiting, *begun)} == set(self._rows), "a row is lost"
        assert len(waiting) == len(self._waiting) and len(waiting) + len(begun) == len(self._rows), "a row is twice"
        self._begun.check_integrity()
        for row in self._rows.values():
            self._pages.check(row)
            assert row.length <= self.max_context, "a row is longer than its context"
            assert (row.slot is not None) == (row.revision is not None and row.state != "waiting"), (
                "a row's pin is wrong"
            )
        self._waiting.check_integrity()
        self._leaving.check_integrity()
        pinned = [row for row in begun if row.slot is not None]
        for revision in {row.revision for row in pinned if row.revision is not None}:
            pins = sum(row.revision == revision for row in pinned) + self._leaving.pins(revision)
            assert self._slots.pinned(revision) == pins, f"adapter {revision[:12]} has wrong pins"
            held = self._slots.slot(revision)
            assert held is not None and all(r.slot == held.index for r in pinned if r.revision == revision), (
                "slot moved"
            )
