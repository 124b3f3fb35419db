"""Grouping encoded examples into padded batches. Pure: the order is a function of the seed and the epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from adaplex_adapters.training.encoding import IGNORED, EncodedExample

POOL_BATCHES = 16
"""Batches are cut from pools of this many, sorted by length: little padding, yet the mix changes every epoch."""


@dataclass(frozen=True)
class Batch:
    """ids, labels: int64 [rows, longest]; padded on the right. learned: tokens that count, after the shift by one.

    No attention mask is needed: under causal attention no real token sees the padding to its right. Only packed rows
    need to know which example a token is of: parts [rows, longest], counted from 0, the padding a part of its own.
    tokens: real tokens, without padding.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    learned: int
    tokens: int
    parts: torch.Tensor | None = None


def pad_batch(examples: Sequence[EncodedExample], pad_id: int) -> Batch:
    """One batch of the given examples in the given order."""
    longest = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), longest), pad_id, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    packed = any(len(e.parts) > 1 for e in examples)
    parts = torch.full_like(ids, -1) if packed else None
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        labels[row, :length] = torch.tensor(example.labels)
        if parts is not None:
            lengths = torch.tensor(example.parts or (length,))
            parts[row, :length] = torch.arange(len(lengths)).repeat_interleave(lengths)
    learned = int((labels[:, 1:] != IGNORED).sum())
    return Batch(ids, labels, learned, sum(len(e.ids) for e in examples), parts)


def join_batches(batches: Sequence[Batch], pad_id: int) -> Batch:
    """The rows of all, in order, padded to the longest."""
    longest = max(batch.ids.shape[1] for batch in batches)

    def padded(rows: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(rows, (0, longest - rows.shape[1]), value=value)

    packed = any(batch.parts is not None for batch in batches)
    parts = [torch.zeros_like(b.ids) if b.parts is None else b.parts for b in batches]
    return Batch(
        torch.cat([padded(b.ids, pad_id) for b in batches]),
        torch.cat([padded(b.labels, IGNORED) for b in batches]),
        sum(b.learned for b in batches),
        sum(b.tokens for b in batches),
        torch.cat([padded(p, -1) for p in parts]) if packed else None,
    )


def ordered_batches(examples: Sequence[EncodedExample], size: int, pad_id: int) -> Iterator[Batch]:
    """Every example once, sorted by length; for measuring."""
    ordered = sorted(examples, key=lambda e: (len(e.ids), e.line))
    for start in range(0, len(ordered), size):
        yield pad_batch(ordered[start : start + size], pad_id)


def shuffled_batches(
    examples: Sequence[EncodedExample], size: int, pad_id: int, seed: int, start: int = 0
) -> Iterator[Batch]:
    """Endless epochs; in each, every example once, batched with others of about its length, in random order.

    start: batches that are left out at the beginning; what follows is the same as without.
    """
    epoch, skipped = divmod(start, batches_per_epoch(len(examples), size))
    while True:
        rng = random.Random(f"{seed}/{epoch}")
        order = rng.sample(range(len(examples)), len(examples))
        groups: list[list[int]] = []
        for begin in range(0, len(order), size * POOL_BATCHES):
            pool = sorted(order[begin : begin + size * POOL_BATCHES], key=lambda i: len(examples[i].ids))
            groups += [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(groups)
        for group in groups[skipped:]:
            yield pad_batch([examples[i] for i in group], pad_id)
        epoch, skipped = epoch + 1, 0


def batches_per_epoch(examples: int, size: int) -> int:
    """Number of batches that `shuffled_batches` makes of each epoch."""
    return -(-examples // size)
