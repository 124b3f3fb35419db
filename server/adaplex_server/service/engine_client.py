"""Keeps an engine process running: starts it, says how it is, and starts it again when it is lost.

There is no other recovery path than a new process. Requests that were under way end with a retryable error; adapters
come back by revision from the store, when a row first names them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from adaplex_adapters.errors import StartupError, Unavailable
from adaplex_server.engine.messages import (
    AdapterMoved,
    EngineInfo,
    Failed,
    FromEngine,
    Progress,
    Ready,
    StepDone,
    ToEngine,
)
from adaplex_server.service.engine_figures import EngineFigures
from adaplex_server.service.engine_link import EngineLink
from adaplex_server.service.engine_process import EngineProcess, launch
from adaplex_server.service.settings import ServiceSettings

log = logging.getLogger(__name__)
CRASH_LOOP = 3
"""So many lives in a row that ended before `healthy_after` are a crash loop."""


@dataclass(frozen=True)
class EngineState:
    """phase: "failed" is a crash loop that is still retried. detail: what is being done, or why it is not ready."""

    phase: Literal["starting", "ready", "failed", "closed"]
    detail: str
    progress: float = 0.0
    restarts: int = 0
    info: EngineInfo | None = None


@dataclass(frozen=True)
class _Life:
    """How one process fared. healthy: it was ready for long enough. why: how it ended, in words. refused.

    What Failed said.
    """

    ready: bool
    healthy: bool
    why: str
    refused: str | None


class EngineClient:
    """The one engine of a service. `start` once, `close` once.

    on_progress(text, fraction): while an engine starts.
    """

    def __init__(self, settings: ServiceSettings, on_progress: Callable[[str, float], None] | None = None) -> None:
        self._settings = settings
        self._on_progress = on_progress
        self.figures = EngineFigures()
        self._ids = itertools.count(1)
        self._state = EngineState("starting", "the engine is being started")
        self._link: EngineLink | None = None
        self._process: EngineProcess | None = None
        self._supervision: asyncio.Task[None] | None = None
        self._first: asyncio.Future[None] | None = None
        self._refused: str | None = None
        self._ready_at: float | None = None
        self._load_seconds = 5.0
        self._pause = 0.0
        self._closing = False

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def rows(self) -> int:
        """Rows under way."""
        return self._link.rows if self._link else 0

    @property
    def running(self) -> EngineLink | None:
        """The present engine when it is ready, for gauges."""
        return self._link if self._state.phase == "ready" else None

    def link(self) -> EngineLink:
        """The present engine. Raises Unavailable with a hint while there is none."""
        if self._state.phase != "ready" or self._link is None:
            raise Unavailable(
                f"the engine is not ready ({self._state.detail}); try again in a moment", retry_after=self.retry_after
            )
        return self._link

    @property
    def retry_after(self) -> float:
        """Seconds after which an engine may be expected: what is left of the pause and one load as long as the last."""
        return float(min(60, max(1, round(self._pause + self._load_seconds))))

    def next_row(self) -> int:
        """A number for a row, never used twice."""
        return next(self._ids)

    async def start(self) -> None:
        """Start the first engine and wait until it is ready. Raises StartupError with the engine's own words."""
        self._first = asyncio.get_running_loop().create_future()
        self._supervision = asyncio.create_task(self._supervise(), name="engine supervision")
        await asyncio.wait({self._first, self._supervision}, return_when=asyncio.FIRST_COMPLETED)
        if self._first.done():
            self._first.result()
        else:
            self._supervision.result()
            raise StartupError("the server was stopped while the engine was starting")

    async def close(self) -> None:
        """End the process; whatever is under way ends with Unavailable."""
        self._closing = True
        if self._link:
            self._link.lose("the server is shutting down; try again elsewhere or later", self.retry_after)
        if self._process:
            self._process.shut_down()
        if self._supervision:
            if self._process is None:
                self._supervision.cancel()
            with contextlib.suppress(asyncio.CancelledError, StartupError):
                await self._supervision
        self._state = replace(self._state, phase="closed", detail="the server is shutting down")

    async def _supervise(self) -> None:
        """One life after the other, with pauses that double while they are short."""
        settings = self._settings
        self._pause, short_lives = 0.0, 0
        while not self._closing:
            life = await self._live()
            if self._closing:
                return
            if self._first and not self._first.done():
                self._first.set_exception(StartupError(life.refused or f"the engine process ended: {life.why}"))
                return
            short_lives = 1 if life.healthy else short_lives + 1
            # The state that is told stays "failed" through the next attempt, until an engine is ready again.
            looping = short_lives >= CRASH_LOOP or not life.ready
            pause = min(settings.restart_longest, settings.restart_first * 2 ** min(short_lives - 1, 16))
            log.error("the engine was lost (%s); attempt %d to start it in %.1f s", life.why, short_lives, pause)
            self._pause = pause
            self._state = replace(
                self._state,
                phase="failed" if looping else "starting",
                detail=f"the engine was lost ({life.why}) and is being started again",
                progress=0.0,
                restarts=self._state.restarts + 1,
            )
            await asyncio.sleep(pause)
            self._pause = 0.0

    async def _live(self) -> _Life:
        """From the start of one process to its end."""
        began = time.monotonic()
        self._refused, self._ready_at = None, None
        link = EngineLink(self._send, self._ids)
        self._link = link

        def on_message(message: FromEngine) -> None:
            self._on_message(link, message, began)

        def on_lost(why: str | None) -> None:
            self._on_lost(link)
            if why:
                log.error("the connection to the engine broke: %s", why)

        try:
            self._process = await launch(self._settings.engine_command, self._settings.engine, on_message, on_lost)
        except StartupError as error:
            return _Life(ready=False, healthy=False, why=error.message, refused=error.message)
        watching = asyncio.create_task(self._watch(link, self._process))
        try:
            why = await self._process.ended()
        finally:
            watching.cancel()
            self._on_lost(link)
            tail, self._process = self._process.tail, None
        lived = time.monotonic() - self._ready_at if self._ready_at is not None else 0.0
        if not self._closing and self._refused is None:
            log.error("the engine process ended: %s; it printed last:\n%s", why, tail or "(nothing)")
        healthy = self._ready_at is not None and lived >= self._settings.healthy_after
        return _Life(self._ready_at is not None, healthy, self._refused or why, self._refused)

    async def _watch(self, link: EngineLink, process: EngineProcess) -> None:
        """An engine that hangs (its device does not answer, somebody stopped it) is as good as dead: say so and end
        it.
        """
        limit = self._settings.stall_seconds
        while True:
            await asyncio.sleep(min(5.0, limit / 4))
            if link.silent > limit:
                log.error("the engine has said nothing for %.0f s while requests wait; it is killed", link.silent)
                process.kill()
                return

    def _send(self, message: ToEngine) -> None:
        if self._process:
            self._process.send(message)

    def _on_lost(self, link: EngineLink) -> None:
        """The socket is closed: nothing more will come, so everything under way ends now."""
        if self._state.phase == "ready" and not self._closing:
            self._state = replace(self._state, phase="starting", detail="the engine was lost", progress=0.0)
        link.lose(
            "the engine was lost while it worked on this request; it is being started again, try again",
            self.retry_after,
        )

    def _on_message(self, link: EngineLink, message: FromEngine, began: float) -> None:
        if isinstance(message, StepDone):
            link.on_step(message)
            if message.figures is not None:
                self.figures.on_step(message.figures)
        elif isinstance(message, AdapterMoved):
            self.figures.on_moved(message)
        elif isinstance(message, Progress):
            self._progress(message.text, message.fraction)
        elif isinstance(message, Ready):
            self._ready_at = time.monotonic()
            self._load_seconds = self._ready_at - began
            self._state = EngineState("ready", "", 1.0, self._state.restarts, message.info)
            log.info("the engine is ready after %.1f s (process %d)", self._load_seconds, message.info.pid)
            if self._first and not self._first.done():
                self._first.set_result(None)
        elif isinstance(message, Failed):
            self._refused = message.message
        else:
            link.on_answer(message)

    def _progress(self, text: str, fraction: float) -> None:
        detail = text if self._state.phase == "starting" else self._state.detail
        self._state = replace(self._state, detail=detail, progress=fraction)
        if self._on_progress:
            self._on_progress(text, fraction)
