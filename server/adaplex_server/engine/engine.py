"""The loop of the engine process: take messages, make a step, tell what it did.

With `overlap` one step is in flight while the host works: step n+1 is launched before the host has seen what n chose,
and what n did is committed and told while n+1 runs. Without, each step is settled as soon as it is launched; it is the
same loop. The order of a pass is what makes it right:

1. `place` and `scrub` before `plan`: adapters and zeroes reach the device before the step that uses them; and they
   touch nothing that the step in flight uses, as that is held until it is settled (see `Leaving`).
2. `plan` and `forward` of n+1, fed on the device with the tokens of n.
3. `settle` and `commit` of n: the only wait. The rows that end here have a wasted place in n+1.
4. `choose` of n+1, launched behind its forward: penalties, seeds and bans see all tokens up to n.

A message that comes while a step runs is handled before the next `plan`. A device that has no memory for n+1 says so in
2 or 4: n is settled as always, n+1 is given up and planned again, smaller.

Owns the order of things and the totals; rows are the `Scheduler`'s, adapters the `Residency`'s, the device the
`Executor`'s. Everything runs in one thread; only reads from the socket and from the store come from others, through
the inbox.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

import torch

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.engine.executor import Forwarded, Launched
from adaplex_server.engine.grammars import Guided
from adaplex_server.engine.host_adapters import AdapterRead
from adaplex_server.engine.messages import (
    Cancel,
    DropAdapter,
    EngineStats,
    LoadAdapter,
    Shutdown,
    StepDone,
    StepFigures,
    Submit,
    ToEngine,
)
from adaplex_server.engine.parts import Parts
from adaplex_server.engine.row import Work
from adaplex_server.engine.step_figures import step_figures
from adaplex_server.model.adapter_pool import RANK_PAGE

Inbox = queue.SimpleQueue[ToEngine | AdapterRead | Guided]

_STEPS_TO_RECOVER = 256


class Engine:
    """clock: monotonic seconds, the same clock as the deadlines of the messages. overlap: one step may be in flight."""

    def __init__(
        self, parts: Parts, inbox: Inbox, clock: Callable[[], float] = time.monotonic, overlap: bool = False
    ) -> None:
        self.parts = parts
        self.overlap = overlap
        self._inbox = inbox
        self._clock = clock
        self._in_flight: Launched | None = None
        self._last_settled = 0.0
        self._launched_at = 0.0
        self._steps = 0
        self._step_seconds = 0.0
        self._figures: StepFigures | None = None

    def run(self) -> None:
        """Until a Shutdown."""
        busy = True
        while self.take_messages(wait=not busy):
            busy = self.step()

    def step(self) -> bool:
        """One pass; False if there was nothing to do, and there will not be before a message or a deadline."""
        p = self.parts
        # Who is refused or has hung up does not wait for a step.
        self._tell(settled=False)
        p.residency.fetch()
        placed = p.residency.place(self._clock)
        p.executor.scrub(p.pool)
        began = self._clock()
        work = p.scheduler.plan(began)
        forwarded = self._forward(work) if work else None
        settled = self._settle()
        if forwarded is not None:
            self._choose(forwarded)
            self._launched_at = began
        if not self.overlap:
            settled = self._settle()
        p.residency.settle_drops()
        told = self._tell(settled)
        return bool(work) or settled or placed or told

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

    def _handle(self, message: ToEngine | AdapterRead | Guided) -> None:
        p, now = self.parts, self._clock()
        if isinstance(message, Submit):
            self._submit(message, now)
        elif isinstance(message, Cancel):
            waits = p.grammars.take(message.row) if p.grammars else None
            if waits is not None:
                p.scheduler.submit(waits, now)
            p.scheduler.cancel(message.row)
        elif isinstance(message, Guided):
            self._begin_guided(message, now)
        elif isinstance(message, LoadAdapter):
            p.residency.load(message, now)
        elif isinstance(message, DropAdapter):
            p.residency.drop(message)
        elif isinstance(message, AdapterRead):
            p.residency.receive(message)

    def _submit(self, message: Submit, now: float) -> None:
        p = self.parts
        error = p.residency.refusal(message.revision)
        if error is not None:
            p.scheduler.refuse(message, error)
        elif message.sampling.constraint is None:
            p.scheduler.submit(message, now)
        elif p.grammars is not None:
            p.grammars.want(message)
        else:
            p.scheduler.refuse(message, InvalidRequest("this engine takes no constraints"))

    def _begin_guided(self, made: Guided, now: float) -> None:
        p = self.parts
        message = p.grammars.take(made.row) if p.grammars else None
        if message is None:
            return  # cancelled meanwhile
        error = made.error or p.residency.refusal(message.revision)
        if error is not None:
            p.scheduler.refuse(message, error)
        else:
            p.scheduler.submit(message, now, made.guide)

    def _forward(self, work: list[Work]) -> Forwarded | None:
        """None if the device has no memory for it."""
        try:
            return self.parts.executor.forward(work)
        except torch.OutOfMemoryError:
            self._abandon(work)
            return None

    def _choose(self, step: Forwarded) -> None:
        try:
            self._in_flight = self.parts.executor.choose(step)
        except torch.OutOfMemoryError:
            self._abandon(list(step.work))

    def _abandon(self, work: list[Work]) -> None:
        self.parts.scheduler.abandon(work)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _settle(self) -> bool:
        """Wait for the step in flight, if there is one, and commit what it has done."""
        step, self._in_flight = self._in_flight, None
        if step is None:
            return False
        outcomes = self.parts.executor.settle(step)
        now = self._clock()
        for one, outcome in zip(step.work, outcomes, strict=True):
            self.parts.scheduler.commit(one, outcome, now)
        self._steps += 1
        # What it shared with the step before counts as that one's.
        seconds = now - max(self._launched_at, self._last_settled)
        self._step_seconds += seconds
        self._figures = step_figures(step.work, seconds)
        self._last_settled = now
        if self._steps % _STEPS_TO_RECOVER == 0:
            self.parts.scheduler.recover()
        return True

    def _tell(self, settled: bool) -> bool:
        """One message for all that has happened."""
        tokens, ends = self.parts.scheduler.take_events()
        if settled or ends:
            figures, self._figures = self._figures, None
            self.parts.send(StepDone(tokens, ends, self.stats(), figures))
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
            slots_total=p.slots.total_slots,
            host_adapter_bytes=p.residency.host_bytes,
        )
