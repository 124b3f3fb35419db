"""Token ids to text, one token at a time, never a broken character.

Both decoders in use are sequences of bytes once looked at closely: byte-level BPE (GPT-2, Llama 3, Qwen, GPT-NeoX)
spells each byte as a printable character, and SentencePiece-like ones (Llama 2, Mistral) spell a space as U+2581 and
a byte outside the vocabulary as `<0xE2>`. So a `TokenBytes` table says once what bytes each token stands for, and a
`Detokenizer` feeds them to an incremental UTF-8 decoder: bytes that do not yet form a character are held back, bytes
that never will become U+FFFD.

What a `Detokenizer` has returned adds up to the `tokenizers` library's decode of the whole for each sequence of
complete characters and, for byte-level BPE, for any sequence at all. (SentencePiece-like byte fallback judges a whole
run of byte tokens at once, so there a run that holds invalid bytes may come out as a different number of U+FFFD.)
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from adaplex_adapters.errors import StartupError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UTF8 = codecs.getincrementaldecoder("utf-8")
SPACE = b" "


@dataclass(frozen=True)
class TokenBytes:
    """What each token id stands for. Shared by all streams of a tokenizer.

    text: bytes by id, b"" for ids that are not in the vocabulary. special: ids of control tokens, whose text is not
    part of an answer. strips_space: a text that starts here loses one leading space (SentencePiece put it there).
    """

    text: tuple[bytes, ...]
    special: frozenset[int]
    strips_space: bool


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (Radford et al. 2019).

    Printable bytes are themselves, others follow from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _byte_level(pieces: Iterable[str]) -> tuple[bytes, ...]:
    alphabet = byte_alphabet()

    def spelled(piece: str) -> bytes:
        # An added token may hold characters outside the alphabet (a plain space): then it stands for itself.
        codes = [alphabet.get(character) for character in piece]
        return piece.encode() if None in codes else bytes(code for code in codes if code is not None)

    return tuple(map(spelled, pieces))


def _byte_fallback(pieces: Iterable[str], space: str) -> tuple[bytes, ...]:
    def spelled(piece: str) -> bytes:
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(space, " ").encode()

    return tuple(map(spelled, pieces))


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """Read the table out of a tokenizer. Raises StartupError for a kind of decoder that is not known."""
    description = json.loads(tokenizer.to_str())
    steps = _steps(description["decoder"])
    kinds = {step["type"] for step in steps}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, token in vocabulary.items():
        pieces[token] = piece
    special = frozenset(token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special)
    if kinds == {"ByteLevel"}:
        return TokenBytes(_byte_level(pieces), special, strips_space=False)
    if kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        space = next((_replaced(step) for step in steps if step["type"] in ("Replace", "Metaspace")), "\u2581")
        strips = any(
            step["type"] == "Strip" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in steps
        )
        return TokenBytes(_byte_fallback(pieces, space), special, strips_space=strips)
    raise StartupError(
        f"the tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is not known; byte-level BPE and "
        "SentencePiece-like tokenizers (Llama, Mistral, Qwen, GPT-NeoX) are"
    )


def _replaced(step: dict[str, Any]) -> str:
    return step["replacement"] if step["type"] == "Metaspace" else step["pattern"]["String"]


class Detokenizer:
    """The text of one answer so far. One owner: the choice it belongs to.

    continues: the text goes on where a plain-text prompt ended, so that a leading space is part of it; otherwise the
    tokenizer's rule for the start of a text holds. skip_special: control tokens have no text.
    """

    __slots__ = ("_bytes", "_decode", "_decoder", "_known", "_skip", "_strip")

    def __init__(self, table: TokenBytes, *, continues: bool = False, skip_special: bool = True) -> None:
        self._bytes = table.text
        self._known = len(table.text)
        self._skip = table.special if skip_special else frozenset[int]()
        self._strip = table.strips_space and not continues
        self._decoder = _UTF8("replace")
        self._decode = self._decoder.decode

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a character is pending, and for control tokens."""
        if token in self._skip or token >= self._known:
            return ""
        piece = self._bytes[token]
        if self._strip and piece:
            self._strip = False
            piece = piece[1:] if piece.startswith(SPACE) else piece
        return self._decode(piece)

    def flush(self) -> str:
        """End of the answer: what is pending will never be a character, so it comes as U+FFFD."""
        return self._decode(b"", True)

    def all(self, tokens: Iterable[int]) -> str:
        """The text of a whole sequence."""
        return "".join([*map(self.push, tokens), self.flush()])
