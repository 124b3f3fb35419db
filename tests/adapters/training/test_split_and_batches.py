from __future__ import annotations

import itertools
from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from adaplex_adapters.training.batches import batches_per_epoch, ordered_batches, pad_batch, shuffled_batches
from adaplex_adapters.training.conversations import Completion
from adaplex_adapters.training.encoding import IGNORED, EncodedExample
from adaplex_adapters.training.split import MAX_HELD_OUT, split_examples


@given(st.lists(st.integers(0, 60), min_size=1, max_size=150), st.floats(0, 0.9), st.integers(0, 5))
def test_the_split_keeps_every_row_once_and_no_prompt_on_both_sides(
    asked: list[int], fraction: float, seed: int
) -> None:
    examples = tuple(Completion(i + 1, str(prompt), "x") for i, prompt in enumerate(asked))
    split = split_examples(examples, fraction, seed)
    assert sorted((*split.train, *split.held_out), key=lambda e: e.line) == list(examples)
    assert not {e.prompt_key for e in split.train} & {e.prompt_key for e in split.held_out}
    assert split.train
    assert split.duplicates == len(asked) - len(set(asked))
    assert split == split_examples(examples, fraction, seed)


def test_sizes_of_the_held_out_part() -> None:
    rows = tuple(Completion(i, str(i), "x") for i in range(10_000))
    assert len(split_examples(rows, 0.05, 0).held_out) == MAX_HELD_OUT
    assert len(split_examples(rows[:100], 0.05, 0).held_out) == 5
    assert len(split_examples(rows[:10], 0.05, 0).held_out) == 1
    assert not split_examples(rows[:9], 0.05, 0).held_out
    assert not split_examples(rows, 0.0, 0).held_out
    assert split_examples(rows, 0.05, 0) != split_examples(rows, 0.05, 1)


def encoded(line: int, length: int) -> EncodedExample:
    return EncodedExample(line, (line,) * length, (IGNORED,) * (length - 1) + (line,))


def test_padding_is_on_the_right_and_never_learned() -> None:
    batch = pad_batch([encoded(7, 2), encoded(9, 4)], pad_id=0)
    assert batch.ids.tolist() == [[7, 7, 0, 0], [9, 9, 9, 9]]
    assert batch.labels.tolist() == [[IGNORED, 7, IGNORED, IGNORED], [IGNORED, IGNORED, IGNORED, 9]]
    assert (batch.learned, batch.tokens) == (2, 6)


@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 3))
def test_each_epoch_has_every_example_once(count: int, size: int, seed: int) -> None:
    examples = [encoded(i + 1, 2 + i % 5) for i in range(count)]
    per_epoch = batches_per_epoch(count, size)
    stream = shuffled_batches(examples, size, 0, seed)
    for _ in range(2):
        rows = torch.cat([b.ids[:, 0] for b in itertools.islice(stream, per_epoch)])
        assert Counter(rows.tolist()) == Counter(range(1, count + 1))
    assert sum(b.tokens for b in ordered_batches(examples, size, 0)) == sum(len(e.ids) for e in examples)


def test_rows_of_a_batch_have_about_one_length_and_epochs_differ() -> None:
    examples = [encoded(i + 1, 2 + i % 50) for i in range(400)]
    stream = shuffled_batches(examples, 8, 0, seed=3)
    first, second = (list(itertools.islice(stream, 50)) for _ in range(2))
    padded = sum(b.ids.numel() for b in first) / sum(b.tokens for b in first)
    assert padded < 1.15  # unsorted: about 1.8
    assert [b.ids.tolist() for b in first] != [b.ids.tolist() for b in second]
