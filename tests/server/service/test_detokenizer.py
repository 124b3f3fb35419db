"""Deltas add up to the library's own decode, and no delta ends inside a character."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from adaplex_adapters.errors import StartupError
from adaplex_server.service.detokenizer import Detokenizer, TokenBytes, byte_alphabet, token_bytes


@pytest.fixture(scope="module")
def byte_level(byte_level_folder: Path) -> tuple[Tokenizer, TokenBytes]:
    tokenizer = Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
    return tokenizer, token_bytes(tokenizer)


@pytest.fixture(scope="module")
def llama_like(llama_like_folder: Path) -> tuple[Tokenizer, TokenBytes]:
    tokenizer = Tokenizer.from_file(str(llama_like_folder / "tokenizer.json"))
    return tokenizer, token_bytes(tokenizer)


def streamed(table: TokenBytes, ids: list[int], **options: bool) -> str:
    detokenizer = Detokenizer(table, **options)
    return "".join([*(detokenizer.push(token) for token in ids), detokenizer.flush()])


def test_byte_alphabet_is_a_bijection() -> None:
    assert sorted(byte_alphabet().values()) == list(range(256))


@given(ids=st.lists(st.integers(0, 499), max_size=60))
def test_any_byte_level_sequence_adds_up_to_the_whole_decode(byte_level: tuple, ids: list[int]) -> None:
    tokenizer, table = byte_level
    ids = [token % tokenizer.get_vocab_size() for token in ids]
    assert streamed(table, ids) == tokenizer.decode(ids, skip_special_tokens=True)
    assert streamed(table, ids, skip_special=False) == tokenizer.decode(ids, skip_special_tokens=False)


@given(text=st.text(max_size=60))
def test_any_text_survives_token_by_token(byte_level: tuple, llama_like: tuple, text: str) -> None:
    for tokenizer, table in (byte_level, llama_like):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        detokenizer = Detokenizer(table)
        deltas = [detokenizer.push(token) for token in ids]
        assert "".join(deltas) + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=False)
        if "\ufffd" not in text:
            assert not any("\ufffd" in delta for delta in deltas)


def test_emoji_split_over_tokens_comes_whole(byte_level: tuple) -> None:
    tokenizer, table = byte_level
    ids = tokenizer.encode("👩‍🚀", add_special_tokens=False).ids
    assert len(ids) > 3
    detokenizer = Detokenizer(table)
    assert [delta for delta in map(detokenizer.push, ids) if delta] == ["👩", "\u200d", "🚀"]
    assert detokenizer.flush() == ""


def test_unfinished_character_is_replaced_at_the_end(byte_level: tuple) -> None:
    tokenizer, table = byte_level
    ids = tokenizer.encode("é", add_special_tokens=False).ids
    detokenizer = Detokenizer(table)
    assert [detokenizer.push(ids[0]), detokenizer.flush()] == ["", "\ufffd"]


def test_leading_space_belongs_to_a_continuation(llama_like: tuple) -> None:
    tokenizer, table = llama_like
    ids = tokenizer.encode("the lazy dog", add_special_tokens=False).ids
    assert streamed(table, ids) == "the lazy dog"
    assert streamed(table, ids, continues=True) == " the lazy dog"


def test_added_token_outside_the_alphabet_is_itself(byte_level: tuple) -> None:
    tokenizer, table = byte_level
    assert streamed(table, [tokenizer.token_to_id("<tool call>")]) == "<tool call>"


def test_ids_outside_the_vocabulary_have_no_text(byte_level: tuple) -> None:
    assert streamed(byte_level[1], [10**6]) == ""


def test_unknown_decoder_is_refused() -> None:
    tokenizer = Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(StartupError, match="WordPiece"):
        token_bytes(tokenizer)
