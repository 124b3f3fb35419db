"""One life of the engine process: start it, hear what it prints, end it."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import socket
from collections import deque
from collections.abc import Callable

from adaplex_adapters.errors import StartupError
from adaplex_server.engine.messages import FromEngine, Shutdown, ToEngine
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.service.frames import FrameProtocol

log = logging.getLogger("adaplex.engine")
TAIL_LINES = 30
SHUTDOWN_SECONDS = 5.0
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\u00a0-\uffff]")


class EngineProcess:
    """A running engine process. Made by `launch`; `ended` is to be awaited exactly once."""

    def __init__(self, process: asyncio.subprocess.Process, frames: FrameProtocol, lost: asyncio.Event) -> None:
        self._process = process
        self._frames = frames
        self._lost = lost
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._listening = asyncio.create_task(self._listen())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def tail(self) -> str:
        """The last lines that it printed."""
        return "\n".join(self._tail)

    def send(self, message: ToEngine) -> None:
        """Queue a message; without effect once the process is gone."""
        self._frames.send(message)

    async def ended(self) -> str:
        """Wait until the connection is lost, make sure that the process ends too, and say how it ended."""
        try:
            await self._lost.wait()
        finally:
            await self._reap()
        return _how(self._process.returncode)

    def shut_down(self) -> None:
        """Ask it to end, and close our end of the socket; `ended` then sees to it."""
        self._frames.send(Shutdown())
        self._frames.close()

    async def _reap(self) -> None:
        """A process that has closed its socket has seconds to end, then it is killed: no orphan may hold the device."""
        self._frames.close()
        try:
            await asyncio.wait_for(self._process.wait(), SHUTDOWN_SECONDS)
        except TimeoutError:
            log.warning("the engine process %d does not end; it is killed", self.pid)
            self.kill()
            await self._process.wait()
        except asyncio.CancelledError:
            self.kill()
            raise
        finally:
            # What it printed last is worth a moment, but a grandchild may keep the pipe open for ever.
            await asyncio.wait({self._listening}, timeout=1.0)
            self._listening.cancel()

    def kill(self) -> None:
        """End it without asking; `ended` then sees to the rest."""
        if self._process.returncode is None:
            self._process.kill()

    async def _listen(self) -> None:
        """Pass on what it prints, line by line; progress bars end their lines with a carriage return."""
        assert self._process.stdout
        rest = ""
        while chunk := await self._process.stdout.read(8192):
            *lines, rest = re.split(r"[\r\n]+", rest + chunk.decode("utf-8", "replace"))
            for line in lines:
                self._heard(line)
            rest = rest[-8192:]
        self._heard(rest)

    def _heard(self, line: str) -> None:
        if line.strip():
            line = _UNPRINTABLE.sub("?", line)
            self._tail.append(line)
            log.info("%s", line)


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit code {code}"


async def launch(
    command: tuple[str, ...],
    settings: EngineSettings,
    on_message: Callable[[FromEngine], None],
    on_lost: Callable[[str | None], None],
) -> EngineProcess:
    """Start an engine process with one end of a socket pair and send it its settings. Raises StartupError."""
    ours, theirs = socket.socketpair()
    lost = asyncio.Event()

    def lost_now(why: str | None) -> None:
        on_lost(why)
        lost.set()

    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            str(theirs.fileno()),
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            # Control-C in a terminal reaches the whole group; the engine must live until requests are drained.
            start_new_session=True,
        )
    except OSError as error:
        ours.close()
        raise StartupError(f"the engine process cannot be started: {error}") from error
    finally:
        theirs.close()
    _, frames = await asyncio.get_running_loop().create_connection(
        lambda: FrameProtocol(on_message, lost_now), sock=ours
    )
    frames.send(settings)
    return EngineProcess(process, frames, lost)
