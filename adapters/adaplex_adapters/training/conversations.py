"""Reading training data: JSONL in the chat, the prompt/completion or the text form, or plain text, checked line by
line before anything is loaded.

Accepted rows (the first is the format of OpenAI's fine-tuning API, the others those of TRL):

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}
    {"prompt": [messages], "completion": [messages]}
    {"text": "..."}                                    every token is learned

In a file that ends in .txt, each paragraph (what stands between blank lines) is one text.

An assistant message with `"weight": 0` is context, not a thing to learn. Other keys of a row are left alone, except
those that would change what the model has to learn (`tools`, `functions`): they are refused, not ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaplex_adapters.errors import InvalidRequest, RequestTooLarge

MAX_LINE_BYTES = 8 * 2**20
MAX_FILE_BYTES = 2 * 2**30
MAX_PARAGRAPH_LINES = 10_000
MAX_REPORTED = 20
ROLES = ("system", "developer", "user", "assistant")
REFUSED_KEYS = ("tools", "functions", "tool_calls", "function_call")


@dataclass(frozen=True)
class Message:
    """One turn. learned: whether its tokens count in the loss (only ever true for the assistant)."""

    role: str
    content: str
    learned: bool


@dataclass(frozen=True)
class Chat:
    """A conversation with at least one learned answer; `line` counts from 1."""

    line: int
    messages: tuple[Message, ...]

    @property
    def prompt_key(self) -> str:
        """What is asked, for telling duplicates: everything before the last learned answer."""
        last = max(i for i, m in enumerate(self.messages) if m.learned)
        return json.dumps([(m.role, m.content) for m in self.messages[:last]])


@dataclass(frozen=True)
class Completion:
    """Plain text to go on from, without a chat template; `line` counts from 1."""

    line: int
    prompt: str
    completion: str

    @property
    def prompt_key(self) -> str:
        """What is asked, for telling duplicates."""
        return json.dumps(self.prompt)


@dataclass(frozen=True)
class PlainText:
    """Text whose every token is learned; `line` counts from 1."""

    line: int
    text: str

    @property
    def prompt_key(self) -> str:
        """For telling duplicates: nothing is asked, so the text itself."""
        return json.dumps(self.text)


Example = Chat | Completion | PlainText


def answer_of(example: Example) -> str:
    """What the example teaches last: the answer to compare a generated one with."""
    if isinstance(example, Chat):
        return next(m.content for m in reversed(example.messages) if m.learned)
    return example.completion if isinstance(example, Completion) else example.text


class _RowError(Exception):
    """What is wrong with one row; becomes one line of the error that the caller sees."""


def read_examples(path: Path) -> tuple[Example, ...]:
    """All examples of a JSONL or .txt file, in order. Blank lines are skipped.

    Raises InvalidRequest naming up to 20 bad lines at once, RequestTooLarge over the size limits.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InvalidRequest(
            f"the training data {path.name!r} cannot be read: {error.strerror}", param="data"
        ) from error
    if size > MAX_FILE_BYTES:
        raise RequestTooLarge(f"the training data has {size} bytes; the limit is {MAX_FILE_BYTES}", param="data")
    examples: list[Example] = []
    problems: list[str] = []
    rows, parse = (_paragraphs(path), _paragraph) if path.suffix.lower() == ".txt" else (_lines(path), parse_row)
    for line, raw in rows:
        try:
            examples.append(parse(raw, line))
        except _RowError as error:
            problems.append(f"line {line}: {error}")
            if len(problems) == MAX_REPORTED:
                problems.append("further lines were not checked")
                break
    if problems:
        raise InvalidRequest("the training data is refused:\n  " + "\n  ".join(problems), param="data")
    if not examples:
        raise InvalidRequest("the training data holds no example; each line must be one JSON object", param="data")
    return tuple(examples)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise RequestTooLarge(f"line {number} is longer than {MAX_LINE_BYTES} bytes", param="data")
            if raw.strip():
                yield number, raw


def _paragraphs(path: Path) -> Iterator[tuple[int, bytes]]:
    """What stands between blank lines, with the number of its first line."""
    begun, last = 0, 0
    pieces: list[bytes] = []
    for line, raw in _lines(path):
        if pieces and line > last + 1:
            yield begun, b"".join(pieces)
            pieces = []
        if not pieces:
            begun = line
        pieces.append(raw)
        last = line
        if len(pieces) > MAX_PARAGRAPH_LINES:
            raise RequestTooLarge(
                f"the paragraph of line {begun} has more than {MAX_PARAGRAPH_LINES} lines", param="data"
            )
    if pieces:
        yield begun, b"".join(pieces)


def _paragraph(raw: bytes, line: int) -> Example:
    try:
        return PlainText(line, raw.decode("utf-8-sig" if line == 1 else "utf-8").strip())
    except UnicodeDecodeError as error:
        raise _RowError(f"not UTF-8 (byte {error.start} of the paragraph)") from error


def parse_row(raw: bytes, line: int) -> Example:
    """One line of the file. Raises a private error that `read_examples` turns into an InvalidRequest."""
    try:
        row = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise _RowError(f"not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise _RowError(f"not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise _RowError("not JSON: nested too deeply") from error
    if not isinstance(row, dict):
        raise _RowError(f"a JSON object is needed, not {type(row).__name__}")
    for key in REFUSED_KEYS:
        if row.get(key):
            raise _RowError(f"{key!r} is not supported in training data")
    if "messages" in row:
        return Chat(line, _learnable(_messages(row["messages"], "messages")))
    if "prompt" in row and "completion" in row:
        return _prompt_completion(row["prompt"], row["completion"], line)
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise _RowError("'text' must be text that is not empty")
        return PlainText(line, row["text"])
    raise _RowError(
        "needs 'messages', 'prompt' and 'completion', or 'text'; has " + (", ".join(map(repr, row)) or "nothing")
    )


def _prompt_completion(prompt: Any, completion: Any, line: int) -> Example:
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise _RowError("'completion' is empty")
        return Completion(line, prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        context = [Message(m.role, m.content, learned=False) for m in _messages(prompt, "prompt")]
        return Chat(line, _learnable((*context, *_messages(completion, "completion"))))
    raise _RowError("'prompt' and 'completion' must both be text or both be lists of messages")


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _RowError(f"{where!r} must be a list with at least one message")
    return tuple(_message(item, f"{where}[{i}]") for i, item in enumerate(value))


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise _RowError(f"{where} must be an object with 'role' and 'content'")
    for key in REFUSED_KEYS:
        if item.get(key):
            raise _RowError(f"{where}: {key!r} is not supported in training data")
    role = item.get("role")
    if role not in ROLES:
        raise _RowError(f"{where}: role {role!r} is not one of {', '.join(ROLES)}")
    weight = item.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise _RowError(f"{where}: weight must be 0 or 1, not {weight!r}")
    content = _text(item.get("content"), where)
    learned = role == "assistant" and weight == 1
    if learned and not content:
        raise _RowError(f"{where}: an assistant message to learn is empty")
    return Message(role, content, learned)


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        if parts and all(isinstance(p, str) for p in parts):
            return "".join(p for p in parts if p is not None)
    raise _RowError(f"{where}: content must be text or a list of text parts")


def _learnable(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not any(m.learned for m in messages):
        raise _RowError("no assistant message to learn (role 'assistant' with weight 1)")
    if messages[0].learned:
        raise _RowError("the first message must not be the assistant's: there is nothing to answer")
    return messages
