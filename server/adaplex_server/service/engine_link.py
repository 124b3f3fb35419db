"""What is under way with one engine process.

Rows and calls, each of which ends exactly once, also when the process dies.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Protocol

from adaplex_adapters.errors import Unavailable, error_named
from adaplex_server.engine.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterLoaded,
    Cancel,
    DropAdapter,
    EngineStats,
    LoadAdapter,
    RowEnd,
    RowToken,
    StepDone,
    Submit,
    ToEngine,
)


class RowListener(Protocol):
    """Hears of one row, on the event loop. now: time.monotonic() of the step's arrival.

    Must not raise, must not block.
    """

    def on_token(self, token: RowToken, now: float) -> None: ...

    def on_end(self, end: RowEnd, now: float) -> None:
        """Called exactly once, last."""


class EngineLink:
    """Rows and calls of one engine's life.

    send: queues a message to the process. ids: numbers for rows and calls, never used twice in the server's life.
    """

    def __init__(self, send: Callable[[ToEngine], None], ids: itertools.count) -> None:
        self._send = send
        self._ids = ids
        self._rows: dict[int, RowListener] = {}
        self._calls: dict[int, asyncio.Future[AdapterLoaded | AdapterDropped]] = {}
        self._lost: Unavailable | None = None
        self._heard = time.monotonic()
        self.stats: EngineStats | None = None

    @property
    def rows(self) -> int:
        """Rows submitted and not yet ended, cancelled ones included."""
        return len(self._rows)

    @property
    def silent(self) -> float:
        """Seconds for which the engine has said nothing although something is under way; 0 while nothing is."""
        return time.monotonic() - self._heard if self._rows or self._calls else 0.0

    def submit(self, row: Submit, listener: RowListener) -> None:
        """Hand a row over; from now on the listener hears of it: at once of its end when the process is gone."""
        if self._lost:
            listener.on_end(_lost_end(row.row, self._lost), time.monotonic())
            return
        self._begin()
        self._rows[row.row] = listener
        self._send(row)

    def cancel(self, row: int) -> None:
        """Stop a row within one step; its end is still told. Rows that have ended are ignored."""
        if row in self._rows:
            self._send(Cancel(row))

    async def load(self, revision: str) -> AdapterLoaded:
        """Put a revision on the device and prove it. Raises what the engine found, Unavailable when it is lost."""
        answer = await self._call(LoadAdapter(next(self._ids), revision))
        assert isinstance(answer, AdapterLoaded)
        return answer

    async def drop(self, revision: str) -> AdapterDropped:
        """Forget a revision. Raises Unavailable when the engine is lost (and the revision with it)."""
        answer = await self._call(DropAdapter(next(self._ids), revision))
        assert isinstance(answer, AdapterDropped)
        return answer

    async def _call(self, message: LoadAdapter | DropAdapter) -> AdapterLoaded | AdapterDropped:
        if self._lost:
            raise self._lost
        answer = asyncio.get_running_loop().create_future()
        self._begin()
        self._calls[message.call] = answer
        self._send(message)
        try:
            return await answer
        finally:
            self._calls.pop(message.call, None)

    def on_step(self, step: StepDone) -> None:
        """Tell every row what the step did for it. The hot path of the API process."""
        self._heard = now = time.monotonic()
        self.stats = step.stats
        rows = self._rows
        for token in step.tokens:
            listener = rows.get(token.row)
            if listener is not None:
                listener.on_token(token, now)
        for end in step.ends:
            listener = rows.pop(end.row, None)
            if listener is not None:
                listener.on_end(end, now)

    def on_answer(self, answer: AdapterLoaded | AdapterFailed | AdapterDropped) -> None:
        """An answer to `load` or `drop`."""
        self._heard = time.monotonic()
        waiting = self._calls.get(answer.call)
        if waiting is None or waiting.done():
            return
        if isinstance(answer, AdapterFailed):
            waiting.set_exception(error_named(answer.error, answer.message))
        else:
            waiting.set_result(answer)

    def _begin(self) -> None:
        """Something is about to be under way: an idle engine owed nobody a word until now."""
        if not self._rows and not self._calls:
            self._heard = time.monotonic()

    def lose(self, message: str, retry_after: float) -> None:
        """The process is gone: end everything that is under way with a retryable error. Only the first call counts."""
        if self._lost:
            return
        self._lost = Unavailable(message, retry_after=retry_after)
        now = time.monotonic()
        rows, self._rows = self._rows, {}
        for row, listener in rows.items():
            listener.on_end(_lost_end(row, self._lost), now)
        for waiting in self._calls.values():
            if not waiting.done():
                waiting.set_exception(Unavailable(message, retry_after=retry_after))


def _lost_end(row: int, lost: Unavailable) -> RowEnd:
    return RowEnd(row, "error", "Unavailable", lost.message, lost.retry_after)
