"""What a person sees while the server starts: one moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class StartupProgress:
    """Owns the console until `finish`. `report` may be called from any thread. say: instead of the console."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self._say = say or _print
        self._console = Console(stderr=True)
        self._shown = ""
        self._task: TaskID | None = None
        self._bar: Progress | None = None
        if self._console.is_terminal and say is None:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)

    def __enter__(self) -> StartupProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def report(self, text: str, fraction: float) -> None:
        """Say what is being done, and how far it is (0..1)."""
        if self._bar:
            if self._task is None:
                self._task = self._bar.add_task(text, total=1.0)
            self._bar.update(self._task, description=text, completed=fraction)
        elif text != self._shown:
            self._say(f"adaplex: {text}")
        self._shown = text

    def finish(self, text: str) -> None:
        """Take the bar away and leave this text."""
        if self._bar:
            self._bar.stop()
        self._say(text)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
