"""Reads what a trainer has appended to its `events.jsonl` (see `adaplex_adapters.training.events`). Owns nothing.

A line that is not ended yet is left for the next time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec


class Result(msgspec.Struct, frozen=True):
    """What a job tells of its end, as far as it matters here. Losses are on held-out rows, None without any."""

    tokens: int = 0
    held_out_before: float | None = None
    held_out_after: float | None = None

    @property
    def better_than_base(self) -> bool:
        """Also where nothing was held out: then nobody knows."""
        if self.held_out_before is None or self.held_out_after is None:
            return True
        return self.held_out_after < self.held_out_before


class Line(msgspec.Struct, frozen=True):
    """One line; its own fields are in `raw` too."""

    at: float
    type: str
    text: str = ""
    step: int | None = None
    tokens: int = 0
    seconds_left: float | None = None
    loss: float | None = None
    metrics: dict[str, float | None] = {}
    error: str = "InternalError"
    message: str = ""
    param: str | None = None
    result: Result = Result()


@dataclass(frozen=True)
class Batch:
    """lines: with all their fields in `raw`, at the same places. end: byte after the last of them."""

    lines: list[Line]
    raw: list[dict[str, Any]]
    end: int


def read_lines(path: Path, begin: int) -> Batch:
    """What stands behind byte `begin`. A line that cannot be read is told as a message."""
    try:
        with path.open("rb") as file:
            file.seek(begin)
            data = file.read()
    except FileNotFoundError:
        return Batch([], [], begin)
    whole = data[: data.rfind(b"\n") + 1]
    batch = Batch([], [], begin + len(whole))
    for text in whole.splitlines():
        try:
            line, raw = msgspec.json.decode(text, type=Line), msgspec.json.decode(text)
        except msgspec.MsgspecError as error:
            raw = {"type": "message", "at": 0.0, "text": f"an unreadable event: {error}"}
            line = msgspec.convert(raw, Line)
        batch.lines.append(line)
        batch.raw.append(raw)
    return batch
