"""One request under way: its rows in the engine, the buffer between, and the deltas for its client.

A row is told to the registry when it begins and when it has ended in the engine, whatever became of the client
meanwhile; the client gets one Finish a choice or one error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec

from adaplex_adapters.errors import AdaplexError, Cancelled, DeadlineExceeded, InternalError, Overloaded, error_named
from adaplex_server.engine.messages import RowEnd, RowToken, Submit
from adaplex_server.service.access.rates import Lease
from adaplex_server.service.choice import Choice
from adaplex_server.service.engine_link import EngineLink
from adaplex_server.service.limits import SEED_SPACE
from adaplex_server.service.mailbox import Event, Mailbox
from adaplex_server.service.series import Series
from adaplex_server.service.stops import StopMatcher, build_stops
from adaplex_server.service.text_codec import TextCodec
from adaplex_server.service.trace import RowTimes, Trace
from adaplex_server.vocabulary import Delta, Finish, GenerateRequest

DEADLINE_GRACE = 2.0
"""Seconds past a deadline after which an engine that has not ended the row is no longer waited for."""


class _Row:
    """Listens to one row of an answer; these are its `RowTimes`. on_end: called once, when the engine is done with the
    row.
    """

    __slots__ = ("_answer", "_began", "_on_end", "_series", "ended", "first", "id", "index", "last", "placed", "tokens")

    def __init__(self, answer: Answer, index: int, row_id: int, began: float, on_end: Callable[[], None]) -> None:
        self.index = index
        self.id = row_id
        self._answer = answer
        self._began = began
        self.placed = self.first = self.last = self.ended = 0.0
        self.tokens = 0
        self._series = answer.series
        self._on_end = on_end

    def on_token(self, token: RowToken, now: float) -> None:
        series = self._series
        series.generated_tokens += 1
        self.tokens += 1
        self._answer.lease.used(1)
        if self.first:
            series.between_tokens.observe(now - self.last)
        else:
            self.first = now
            series.first_token.observe(now - self._began)
            series.cached_tokens += token.cached_tokens
            self._place(token.began)
        self.last = now
        self._answer.receive(self.index, token)

    def _place(self, began: float) -> None:
        if began:
            self.placed = began
            self._series.queue.observe(max(0.0, began - self._began))

    def on_end(self, end: RowEnd, now: float) -> None:
        self._place(end.began)
        self.ended = now
        self._series.shapes.row_ended(self.tokens, self.placed, self.first, self.last)
        self._on_end()
        self._answer.receive(self.index, end)


class Answer:
    """The way of one request from its submission to its last choice's end.

    lease: of the caller's allowance, charged with every token. row_buffer: events kept for a slow reader, per choice.
    """

    def __init__(
        self,
        request: GenerateRequest,
        link: EngineLink,
        text: TextCodec,
        series: Series,
        lease: Lease,
        row_buffer: int,
    ) -> None:
        self.request = request
        self.lease = lease
        self.series = series
        self.began = time.monotonic()
        self._link = link
        self._mailbox = Mailbox(row_buffer * request.n)
        stops = build_stops(request.stop)
        self._open: dict[int, Choice] = {
            index: Choice(
                index,
                len(request.prompt),
                request.sampling,
                text.detokenizer(request.prompt),
                StopMatcher(stops, include=request.include_stop) if stops else None,
            )
            for index in range(request.n)
        }
        self._rows: list[_Row] = []
        self._over = False
        self._timer: asyncio.TimerHandle | None = None
        # How the request ended, for its count: a reader that leaves early changes nothing here.
        self.outcome = "cancelled"
        self.trace: Trace | None = None

    def submit(
        self,
        revision: str | None,
        virtual: int,
        next_row: Callable[[], int],
        on_row_end: Callable[[], None],
        weight: float = 1.0,
    ) -> None:
        """Hand all rows to the engine; choice i samples with seed + i. virtual: tokens of the revision's soft prompt.
        on_row_end: called once for every row. weight: of the revision, when the engine is busy.
        """
        request = self.request
        deadline = None if request.deadline is None else self.began + request.deadline
        if request.deadline is not None:
            self._timer = asyncio.get_running_loop().call_later(request.deadline + DEADLINE_GRACE, self._too_late)
        prompt = list(request.prompt)
        self.series.prompt_tokens += len(prompt)
        self.series.shapes.asked(len(prompt), request.n, request.sampling.max_tokens)
        for index in range(request.n):
            sampling = request.sampling
            if index:
                sampling = msgspec.structs.replace(sampling, seed=(sampling.seed + index) % SEED_SPACE)
            row = _Row(self, index, next_row(), self.began, on_row_end)
            self._rows.append(row)
            priority = request.priority
            of = request.caller.owner or ""
            self._link.submit(Submit(row.id, prompt, sampling, revision, deadline, priority, virtual, weight, of), row)

    @property
    def rows(self) -> Sequence[RowTimes]:
        """The way of each row so far, in the order of the choices."""
        return self._rows

    @property
    def open(self) -> bool:
        """Whether a choice has not ended yet."""
        return bool(self._open)

    async def take(self) -> list[Event]:
        """What has happened since the last call; raises what ended the request."""
        return await self._mailbox.take()

    def receive(self, index: int, event: RowToken | RowEnd) -> None:
        """From the engine's link.

        A client that does not read fast enough loses its request, and nobody else's waits.
        """
        if not self._over and not self._mailbox.put(index, event):
            self.abort(Overloaded("the client reads too slowly: its buffer is full and the rest was not generated"))

    def read(self, events: list[Event]) -> list[Delta | Finish | AdaplexError]:
        """Turn events into what the client is sent; an error is the last item.

        Tokens that came together share a delta.
        """
        items: list[Delta | Finish | AdaplexError] = []
        touched: dict[int, Choice] = {}
        for index, event in events:
            choice = self._open.get(index)
            if choice is None:  # its stop string has matched; the row is being cancelled
                continue
            if isinstance(event, RowToken):
                choice.push(event)
                touched[index] = choice
                if choice.matched:
                    self._link.cancel(self._rows[index].id)
                    self._finish(choice, None, items)
                    del touched[index]
            elif event.reason in ("error", "cancelled"):
                _flush(touched, items)
                items.append(_error_of(event))
                return items
            else:
                self._finish(choice, event, items)
                touched.pop(index, None)
        _flush(touched, items)
        return items

    def _finish(self, choice: Choice, end: RowEnd | None, items: list[Delta | Finish | AdaplexError]) -> None:
        del self._open[choice.index]
        last, finish = choice.finish(end)
        if last is not None:
            items.append(last)
        items.append(finish)
        if not self._open:
            self.outcome = finish.reason

    def abort(self, error: AdaplexError) -> None:
        """End the request with this error after what is buffered, and cancel its rows."""
        self._mailbox.fail(error)
        self._stop()

    def close(self) -> None:
        """The reader is done or gone. Rows that still run are cancelled."""
        self._stop()
        if self._timer:
            self._timer.cancel()

    def _stop(self) -> None:
        if not self._over:
            self._over = True
            for row in self._rows:
                self._link.cancel(row.id)

    def _too_late(self) -> None:
        self.abort(DeadlineExceeded(f"the request was not done within its {self.request.deadline:g} s"))


def _flush(touched: dict[int, Choice], items: list[Delta | Finish | AdaplexError]) -> None:
    for choice in touched.values():
        delta = choice.delta()
        if delta is not None:
            items.append(delta)


def _error_of(end: RowEnd) -> AdaplexError:
    if end.reason == "cancelled":
        return Cancelled("the request was cancelled")
    if end.error is None:
        return InternalError(end.message or "the engine ended the request without saying why")
    return error_named(end.error, end.message, retry_after=end.retry_after)
