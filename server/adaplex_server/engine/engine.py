"""The loop of the engine process: take messages, make a step, tell what it did.

Owns the order of things and the totals; rows are the `Scheduler`'s, adapters the `Residency`'s, the device the
`Executor`'s. Everything runs in one thread; only reads from the socket and from the store come from others, through
the inbox.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

import torch

from adaplex_server.engine.host_adapters import AdapterRead
from adaplex_server.engine.messages import (
    Cancel,
    DropAdapter,
    EngineStats,
    LoadAdapter,
    Shutdown,
    StepDone,
    Submit,
    ToEngine,
)
from adaplex_server.engine.parts import Parts
from adaplex_server.engine.row import Work
from adaplex_server.model.adapter_pool import RANK_PAGE

Inbox = queue.SimpleQueue[ToEngine | AdapterRead]

_STEPS_TO_RECOVER = 256


class Engine:
    """clock: monotonic seconds, the same clock as the deadlines of the messages."""

    def __init__(self, parts: Parts, inbox: Inbox, clock: Callable[[], float] = time.monotonic) -> None:
        self.parts = parts
        self._inbox = inbox
        self._clock = clock
        self._steps = 0
        self._step_seconds = 0.0

    def run(self) -> None:
        """Until a Shutdown."""
        busy = True
        while self.take_messages(wait=not busy):
            busy = self.step()

    def step(self) -> bool:
        """One step; False if there was nothing to do, and there will not be before a message or a deadline."""
        p = self.parts
        p.residency.fetch()
        placed = p.residency.place(self._clock)
        p.executor.scrub(p.pool)
        work = p.scheduler.plan(self._clock())
        if work:
            self._execute(work)
        p.residency.settle_drops()
        told = self._tell(stepped=bool(work))
        return bool(work) or placed or told

    def take_messages(self, wait: bool) -> bool:
        """Handle all that has come; with `wait`, sleep until something does or a deadline passes. False: shut down."""
        try:
            message = self._inbox.get(block=wait, timeout=self._until_deadline() if wait else None)
            while True:
                if isinstance(message, Shutdown):
                    return False
                self._handle(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return True

    def _handle(self, message: ToEngine | AdapterRead) -> None:
        p, now = self.parts, self._clock()
        if isinstance(message, Submit):
            error = p.residency.refusal(message.revision)
            if error is None:
                p.scheduler.submit(message, now)
            else:
                p.scheduler.refuse(message, error)
        elif isinstance(message, Cancel):
            p.scheduler.cancel(message.row)
        elif isinstance(message, LoadAdapter):
            p.residency.load(message, now)
        elif isinstance(message, DropAdapter):
            p.residency.drop(message)
        elif isinstance(message, AdapterRead):
            p.residency.receive(message)

    def _execute(self, work: list[Work]) -> None:
        began = self._clock()
        try:
            outcomes = self.parts.executor.run(work)
        except torch.OutOfMemoryError:
            self.parts.scheduler.shrink(work)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return
        now = self._clock()
        for one, outcome in zip(work, outcomes, strict=True):
            self.parts.scheduler.commit(one, outcome, now)
        self._steps += 1
        self._step_seconds += now - began
        if self._steps % _STEPS_TO_RECOVER == 0:
            self.parts.scheduler.recover()

    def _tell(self, stepped: bool) -> bool:
        tokens, ends = self.parts.scheduler.take_events()
        if stepped or ends:
            self.parts.send(StepDone(tokens, ends, self.stats()))
        return bool(ends)

    def _until_deadline(self) -> float | None:
        deadline = self.parts.scheduler.next_deadline()
        return None if deadline is None else max(0.0, deadline - self._clock())

    def stats(self) -> EngineStats:
        """The gauges and totals of now."""
        p = self.parts
        # The probe's own pages are no part of what rows can have.
        pages = p.pool.total - len(p.probe_pages)
        return EngineStats(
            waiting=p.scheduler.waiting,
            running=p.scheduler.running,
            pages_used=pages - p.pool.free - p.cache.idle,
            pages_cached=p.cache.idle,
            pages_total=pages,
            adapters_resident=len(p.slots),
            rank_rows_used=p.slots.used_pages * RANK_PAGE,
            rank_rows_total=p.slots.total_pages * RANK_PAGE,
            adapter_loads=p.residency.loads,
            adapter_evictions=p.slots.evictions,
            preemptions=p.scheduler.preemptions,
            prefix_hit_tokens=p.scheduler.hit_tokens,
            prefix_query_tokens=p.scheduler.query_tokens,
            steps=self._steps,
            step_seconds=self._step_seconds,
        )
