"""Being asked to stop: SIGTERM and the first Ctrl-C end training after the step under way, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopAsked:
    """Whether it was asked; call it to know."""

    def __init__(self) -> None:
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def ask(self) -> None:
        """Ask."""
        self._asked = True


@contextmanager
def stop_on_signals() -> Iterator[StopAsked]:
    """Inside, the first signal asks; a second Ctrl-C interrupts at once. The old handlers come back."""
    asked = StopAsked()

    def handle(number: int, frame: FrameType | None) -> None:
        if asked() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.ask()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
