"""From examples to what a run learns and measures: split, encoded, checked for duplicates and leaks. Owns nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.conversations import Example, PlainText, answer_of
from adaplex_adapters.training.encoding import EncodedExample, encode_example
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.split import split_examples

SHOWN_LINES = 8


@dataclass(frozen=True)
class DataReport:
    """rows, held_out: examples that are used. too_long, leaks: lines that are left out; leaks are rows of a validation
    file whose prompt (but for case and white space) is also trained on. duplicates: rows that repeat an earlier
    prompt; conflicting: those of them with another answer. tokens, learned: of the training rows, an epoch.
    sha256: of the examples, in order.
    """

    rows: int
    held_out: int
    duplicates: int
    conflicting: int
    leaks: tuple[int, ...]
    too_long: tuple[int, ...]
    tokens: int
    learned: int
    sha256: str

    def notes(self, max_length: int) -> Iterator[str]:
        """What a person should know, a line each."""
        if self.duplicates:
            conflict = f" ({self.conflicting} of them with another answer)" if self.conflicting else ""
            repeated = f"{self.duplicates} rows repeat the prompt of an earlier one{conflict}"
            yield f"{repeated}; kept, on the same side of the split"
        if self.leaks:
            yield (
                f"{len(self.leaks)} validation rows ask what a training row asks and are left out of the measurement "
                f"({shown_lines(self.leaks)})"
            )
        if self.too_long:
            yield (
                f"{len(self.too_long)} rows are longer than {max_length} tokens and are left out "
                f"({shown_lines(self.too_long)})"
            )


@dataclass(frozen=True)
class Rows:
    """train: as they are batched, before packing. asked: held-out examples that have an answer to compare with."""

    train: tuple[EncodedExample, ...]
    held_out: tuple[EncodedExample, ...]
    asked: tuple[Example, ...]
    report: DataReport


def prepare_rows(
    examples: tuple[Example, ...], tokenizer: Any, options: TrainOptions, validation: tuple[Example, ...] | None = None
) -> Rows:
    """Encoded training and held-out rows. Without a validation set, some prompts are held out by the seed.

    Raises InvalidRequest where nothing is left to train on, or the base's template refuses a row.
    """
    split = split_examples(examples, 0.0 if validation is not None else options.held_out, options.seed)
    measured, leaks = (split.held_out, ()) if validation is None else _without_leaks(examples, validation)
    train = [encode_example(e, tokenizer) for e in split.train]
    held_out = [(e, encode_example(e, tokenizer)) for e in measured]
    long = sorted(e.line for e in (*train, *(h for _, h in held_out)) if len(e.ids) > options.max_length)
    train = [e for e in train if len(e.ids) <= options.max_length]
    held_out = [(e, h) for e, h in held_out if len(h.ids) <= options.max_length and h.learned]
    if not train:
        raise InvalidRequest(f"every row is longer than max_length {options.max_length}", param="max_length")
    report = DataReport(
        rows=len(train),
        held_out=len(held_out),
        duplicates=split.duplicates,
        conflicting=_conflicting(examples),
        leaks=leaks,
        too_long=tuple(long),
        tokens=sum(len(e.ids) for e in train),
        learned=sum(e.learned for e in train),
        sha256=data_digest(examples),
    )
    asked = tuple(e for e, _ in held_out if not isinstance(e, PlainText))[: options.metric_rows]
    return Rows(tuple(train), tuple(h for _, h in held_out), asked, report)


def data_digest(examples: Sequence[Example]) -> str:
    """SHA-256 (hex) over the examples' content, in order; lines and layout of the file do not matter."""
    digest = hashlib.sha256()
    for example in examples:
        content = json.dumps([type(example).__name__, example.prompt_key, answer_of(example)], ensure_ascii=True)
        digest.update(content.encode() + b"\n")
    return digest.hexdigest()


def shown_lines(lines: Sequence[int]) -> str:
    """ "lines 3, 7, ..." """
    return "lines " + ", ".join(map(str, lines[:SHOWN_LINES])) + (", ..." if len(lines) > SHOWN_LINES else "")


def _without_leaks(
    examples: Sequence[Example], validation: Sequence[Example]
) -> tuple[tuple[Example, ...], tuple[int, ...]]:
    trained = {_loose(e) for e in examples}
    kept = tuple(e for e in validation if _loose(e) not in trained)
    return kept, tuple(e.line for e in validation if _loose(e) in trained)


def _loose(example: Example) -> str:
    """The prompt without case and white space."""
    return "".join(example.prompt_key.casefold().replace("\\n", " ").split())


def _conflicting(examples: Sequence[Example]) -> int:
    first: dict[str, str] = {}
    return sum(first.setdefault(e.prompt_key, answer_of(e)) != answer_of(e) for e in examples)
