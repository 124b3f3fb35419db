"""Takes an answer apart into text and tool calls while it comes, character by character of arguments.

What looks like a call and is none (another form, a name that no tool has) stays text, whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from adaplex_server.service.tool_formats import ToolFormat

_STRING = r'"(?:[^"\\]|\\.)*"'
_HEAD = re.compile(rf'\{{\s*"name"\s*:\s*({_STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)')
_BETWEEN = " \t\r\n,;[]}"


@dataclass(frozen=True)
class Said:
    """Text beside the calls."""

    text: str


@dataclass(frozen=True)
class Called:
    """A call of this number begins."""

    number: int
    name: str


@dataclass(frozen=True)
class Argued:
    """More of a call's arguments: a piece of JSON text."""

    number: int
    text: str


Piece = Said | Called | Argued


class _Json:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False

    def end(self, text: str) -> int | None:
        """Where in `text` the object has ended, if it has."""
        for place, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return None


class ToolCalls:
    """The calls of one choice. names: of the tools that there are."""

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        self._form = form
        self._names = names
        self._state: Literal["start", "text", "between", "object", "arguments", "closing", "plain"] = "start"
        self._held = ""
        self._raw = ""
        self._json = _Json()
        self.calls = 0

    def push(self, text: str) -> list[Piece]:
        """What is new."""
        self._held += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """The end of the answer: what was held back is text, unless it only stood between calls."""
        rest = self._raw + self._held
        silent = self._state in ("between", "closing") and self.calls > 0
        self._held = self._raw = ""
        return [] if silent or not rest or (self.calls and not rest.strip()) else [Said(rest)]

    def _step(self, pieces: list[Piece]) -> bool:
        """One move; False when more text is needed."""
        return bool(getattr(self, f"_{self._state}")(pieces))

    def _start(self, pieces: list[Piece]) -> bool:
        """Whether the answer begins with a call, in formats where that is what makes it one."""
        if self._form.opening:
            self._state = "text"
            return True
        begin = self._held.lstrip()
        if not begin:
            return False
        sign = "[" if self._form.name == "mistral" else "{"
        self._state = "between" if begin[0] == sign else "plain"
        return True

    def _plain(self, pieces: list[Piece]) -> bool:
        if self._raw or self._held:
            pieces.append(Said(self._raw + self._held))
        self._raw = self._held = ""
        return False

    def _text(self, pieces: list[Piece]) -> bool:
        opening = self._form.opening
        place = self._held.find(opening)
        if place >= 0:
            before, self._held = self._held[:place], self._held[place + len(opening) :]
            if before.strip():
                pieces.append(Said(before.rstrip()))
            self._raw, self._state = opening, "between"
            return True
        # What may be the beginning of the opening, and space before it, is held back.
        keep = next(
            n for n in range(min(len(opening) - 1, len(self._held)), -1, -1) if self._held.endswith(opening[:n])
        )
        said = self._held[: len(self._held) - keep].rstrip()
        if said:
            pieces.append(Said(said))
            self._held = self._held[len(said) :]
        return False

    def _between(self, pieces: list[Piece]) -> bool:
        rest = self._held.lstrip(_BETWEEN)
        if not rest:
            return False
        skipped = self._held[: len(self._held) - len(rest)]
        self._raw, self._held = self._raw + skipped, rest
        self._state = "object" if rest[0] == "{" else "plain"
        return True

    def _object(self, pieces: list[Piece]) -> bool:
        """The head of a call: its name, then the arguments' key; or the whole object in another order."""
        head = _HEAD.match(self._held)
        if head is not None:
            name = json.loads(head[1])
            if name not in self._names:
                self._state = "plain"
                return True
            pieces.append(Called(self.calls, name))
            self._raw, self._held = "", self._held[head.end() :]
            self._json, self._state = _Json(), "arguments"
            return True
        end = _Json().end(self._held)
        if end is None:
            return False
        found = _call_of(self._held[:end], self._form.key)
        if found is None or found[0] not in self._names:
            self._state = "plain"
            return True
        pieces += [Called(self.calls, found[0]), Argued(self.calls, found[1])]
        self._raw, self._held = "", self._held[end:]
        self._ended()
        return True

    def _arguments(self, pieces: list[Piece]) -> bool:
        if not self._held:
            return False
        end = self._json.end(self._held)
        pieces.append(Argued(self.calls, self._held[:end]))
        self._held = "" if end is None else self._held[end:]
        if end is None:
            return False
        self._ended()
        return True

    def _ended(self) -> None:
        self.calls += 1
        self._state = "closing" if self._form.closing else "between"

    def _closing(self, pieces: list[Piece]) -> bool:
        place = self._held.find(self._form.closing)
        if place < 0:
            return False
        self._held = self._held[place + len(self._form.closing) :]
        self._state = "text"
        return True


def _call_of(text: str, key: str) -> tuple[str, str] | None:
    """Name and arguments, as JSON text, of an object that is a call."""
    try:
        made = json.loads(text)
    except ValueError:
        return None
    name, arguments = made.get("name"), made.get(key, {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)
