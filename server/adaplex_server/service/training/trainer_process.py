"""The process that trains one job: started beside the engine, with less right to the CPU.

What it does is told through the job's folder (`events.jsonl`), so that nothing is lost when either side dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import deque
from pathlib import Path

COMMAND = (sys.executable, "-m", "adaplex_server.service.training.child")
_NICE = 10
_TAIL_LINES = 20
_LINE = 500


class TrainerProcess:
    """A running trainer. Made by `start`; `ended` is to be awaited exactly once."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, command: tuple[str, ...], folder: Path) -> TrainerProcess:
        """Start training on a job's folder. Raises OSError."""
        process = await asyncio.create_subprocess_exec(
            *command,
            str(folder),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        with contextlib.suppress(ProcessLookupError):  # it may have ended already
            os.setpriority(os.PRIO_PROCESS, process.pid, _NICE)
        return cls(process)

    @property
    def tail(self) -> str:
        """The last lines that it printed."""
        return "\n".join(self._tail)

    def pause(self) -> None:
        """Ask it to keep a checkpoint and end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def ended(self) -> int:
        """Its exit code (see `job_terms`), or minus the signal that killed it."""
        try:
            code = await self._process.wait()
            await asyncio.wait({self._reading}, timeout=1.0)
        finally:
            self._reading.cancel()
        return code

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def _read(self) -> None:
        """To the end, however long a line is: who writes to a full pipe stands still."""
        assert self._process.stdout
        rest = ""
        while chunk := await self._process.stdout.read(8192):
            *lines, rest = re.split(r"[\r\n]+", rest + chunk.decode("utf-8", "replace"))
            self._tail.extend(line[:_LINE] for line in lines if line.strip())
            rest = rest[:_LINE]
        self._tail.append(rest)
