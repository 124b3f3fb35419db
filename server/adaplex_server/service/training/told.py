"""Reads what a trainer has appended to its `events.jsonl`. Owns nothing.

A line is one JSON object with a `kind` of its own ("message", "metrics", "checkpoint", "done", "failed"); a line that
is not ended yet is left for the next time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec


class Line(msgspec.Struct, frozen=True):
    """One line. Fields beyond these are in `rest`."""

    time: float
    kind: Literal["message", "metrics", "checkpoint", "done", "failed"]
    level: Literal["info", "warn", "error"] = "info"
    message: str = ""
    code: str = "internal_error"
    param: str | None = None
    step: int = 0
    seconds_left: float | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    better_than_base: bool = True
    metrics: dict[str, float | None] = {}
    files: list[str] = []


@dataclass(frozen=True)
class Batch:
    """lines: with all their fields in `raw`, at the same places. end: byte after the last of them."""

    lines: list[Line]
    raw: list[dict[str, Any]] = field(default_factory=list)
    end: int = 0


def read_lines(path: Path, begin: int) -> Batch:
    """What stands behind byte `begin`. A line that cannot be read is told as a warning."""
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
            raw = {"kind": "message", "time": 0.0, "level": "warn", "message": f"an unreadable event: {error}"}
            line = msgspec.convert(raw, Line)
        batch.lines.append(line)
        batch.raw.append(raw)
    return batch
