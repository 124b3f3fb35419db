"""The bounded buffer between the engine, which writes a step at a time, and the one reader of a request."""

from __future__ import annotations

import asyncio

from adaplex_adapters.errors import AdaplexError
from adaplex_server.engine.messages import RowEnd, RowToken

Event = tuple[int, RowToken | RowEnd]
"""(index of the choice, what happened to it)"""


class Mailbox:
    """Events of one request. capacity: tokens kept for a reader that is slower than the model; ends always fit."""

    __slots__ = ("_capacity", "_error", "_events", "_waiting")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._events: list[Event] = []
        self._error: AdaplexError | None = None
        self._waiting: asyncio.Future[None] | None = None

    def put(self, index: int, event: RowToken | RowEnd) -> bool:
        """False when the buffer is full and the event was not taken."""
        events = self._events
        if len(events) >= self._capacity and isinstance(event, RowToken):
            return False
        events.append((index, event))
        if self._waiting is not None:
            self._wake()
        return True

    def fail(self, error: AdaplexError) -> None:
        """The reader gets this error after what is buffered. The first one counts."""
        if self._error is None:
            self._error = error
            self._wake()

    async def take(self) -> list[Event]:
        """Everything that has come since the last call, at least one event.

        Raises what `fail` was given, when all is read.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        events, self._events = self._events, []
        return events

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
