from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaplex_adapters.errors import InvalidRequest, RequestTooLarge
from adaplex_adapters.training.conversations import Chat, Completion, Message, PlainText, read_examples
from adaplex_adapters.training.encoding import IGNORED, encode_example
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.rows import data_digest, prepare_rows


def completions(*pairs: tuple[str, str]) -> tuple[Completion, ...]:
    return tuple(Completion(i + 1, prompt, answer) for i, (prompt, answer) in enumerate(pairs))


def test_repeats_contradictions_and_leaks_are_told(tokenizer: Any) -> None:
    rows = completions(("a", "1"), ("a", "1"), ("a", "2"), ("b", "1"), *((f"c{i}", "x") for i in range(10)))
    validation = completions(("B ", "1"), ("new", "2"), ("C 3", "x"))
    found = prepare_rows(rows, tokenizer, TrainOptions(), validation)
    report = found.report
    assert (report.rows, report.held_out, report.duplicates, report.conflicting) == (14, 1, 2, 1)
    assert report.leaks == (1, 3)
    notes = list(report.notes(1024))
    assert any("2 rows repeat" in n and "1 of them with another answer" in n for n in notes)
    assert any("lines 1, 3" in n for n in notes)


def test_the_digest_is_of_the_content(tokenizer: Any) -> None:
    rows = completions(("a", "1"), ("b", "2"))
    assert data_digest(rows) == data_digest(tuple(Completion(r.line + 7, r.prompt, r.completion) for r in rows))
    assert data_digest(rows) != data_digest(rows[::-1])
    assert len(prepare_rows(rows, tokenizer, TrainOptions()).report.sha256) == 64


def test_text_is_learned_whole_and_answers_alone_otherwise(tokenizer: Any) -> None:
    text = encode_example(PlainText(1, "abc"), tokenizer)
    assert text.labels == text.ids and tokenizer.decode(text.ids) == "abc<|im_end|>"
    chat = Chat(1, (Message("user", "x", False), Message("assistant", "yes", True)))
    encoded = encode_example(chat, tokenizer)
    learned = tokenizer.decode([t for t in encoded.labels if t != IGNORED])
    assert learned == "yes<|im_end|>"
    assert tokenizer.decode(encoded.ids).count("<|im_start|>assistant") == 1


def test_a_text_file_is_its_paragraphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n\n \nthree\n\n\nfour")
    assert read_examples(file) == (PlainText(1, "one\ntwo"), PlainText(5, "three"), PlainText(8, "four"))
    file.write_bytes(b"good\n\nbad \xff\n")
    with pytest.raises(InvalidRequest, match="line 3: not UTF-8"):
        read_examples(file)
    monkeypatch.setattr("adaplex_adapters.training.conversations.MAX_PARAGRAPH_LINES", 2)
    file.write_text("1\n2\n3\n")
    with pytest.raises(RequestTooLarge, match="line 1"):
        read_examples(file)


def test_nothing_left_to_learn_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(InvalidRequest, match="longer than max_length 8"):
        prepare_rows(completions(("a" * 20, "1")), tokenizer, TrainOptions(max_length=8))
