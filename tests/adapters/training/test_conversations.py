from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaplex_adapters.errors import InvalidRequest, RequestTooLarge
from adaplex_adapters.training import conversations
from adaplex_adapters.training.conversations import Chat, Completion, read_examples

USER = {"role": "user", "content": "two"}
GOOD = {"messages": [USER, {"role": "assistant", "content": "2"}]}


def write(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return path


def test_every_form_is_read_with_its_line_number(tmp_path: Path) -> None:
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, GOOD["messages"][1]]}
    split = {"prompt": [USER], "completion": [{"role": "assistant", "content": "2"}]}
    path = write(tmp_path, GOOD, b"", {"prompt": "a", "completion": "b", "id": 7}, split, parts)
    chat, completion, turned, text = read_examples(path)
    assert isinstance(chat, Chat) and [(m.content, m.learned) for m in chat.messages] == [("two", False), ("2", True)]
    assert completion == Completion(3, "a", "b")
    assert isinstance(turned, Chat) and turned.messages == chat.messages and turned.line == 4
    assert isinstance(text, Chat) and text.messages[0].content == "a"


def test_weight_zero_is_context(tmp_path: Path) -> None:
    first = {"role": "assistant", "content": "no", "weight": 0}
    (chat,) = read_examples(write(tmp_path, {"messages": [USER, first, USER, {**first, "weight": 1}]}))
    assert isinstance(chat, Chat)
    assert [m.learned for m in chat.messages] == [False, False, False, True]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b"{", "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        ([1], "a JSON object is needed"),
        ({}, "needs 'messages'"),
        ({"text": " "}, "'text'"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hi"}, "at least one message"),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": [USER, {"role": "assistant", "content": "x", "weight": 0}]}, "no assistant message"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "first message"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, "messages[1]: role 'bot'"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages[1]: an assistant message to learn"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1]: content"),
        ({"messages": [USER, {"role": "assistant", "content": "x", "weight": 2}]}, "weight must be 0 or 1"),
        ({"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [1]}]}, "'tool_calls'"),
        ({**GOOD, "tools": [{}]}, "'tools'"),
        ({"prompt": "x", "completion": ""}, "'completion' is empty"),
        ({"prompt": "x", "completion": 3}, "must both be text"),
        ({"prompt": [USER], "completion": "x"}, "must both be text"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: object, said: str) -> None:
    with pytest.raises(InvalidRequest, match="line 2: ") as caught:
        read_examples(write(tmp_path, GOOD, row, GOOD))
    assert said in caught.value.message
    assert "line 1" not in caught.value.message and "line 3" not in caught.value.message


def test_all_bad_lines_are_told_at_once_up_to_a_limit(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_examples(write(tmp_path, *[{}] * 50))
    assert caught.value.message.count("\n  line ") == conversations.MAX_REPORTED
    assert "were not checked" in caught.value.message


def test_no_rows_no_file_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="no example"):
        read_examples(write(tmp_path, b""))
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_examples(tmp_path / "none.jsonl")
    monkeypatch.setattr(conversations, "MAX_LINE_BYTES", 100)
    with pytest.raises(RequestTooLarge, match="line 2"):
        read_examples(write(tmp_path, GOOD, b" " * 200))
    monkeypatch.setattr(conversations, "MAX_FILE_BYTES", 10)
    with pytest.raises(RequestTooLarge, match="limit is 10"):
        read_examples(write(tmp_path, GOOD))
