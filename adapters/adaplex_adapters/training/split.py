"""Setting rows aside before training, so that the loss can be read on rows that were never learned.

Rows that ask the same thing stay on one side: a held-out row that also stands in the training rows would measure
memory.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from adaplex_adapters.training.conversations import Example

MAX_HELD_OUT = 200
MIN_TO_SPLIT = 10


@dataclass(frozen=True)
class Split:
    """duplicates: rows whose prompt had stood in an earlier row (kept, on the same side as the first)."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    duplicates: int


def split_examples(examples: tuple[Example, ...], fraction: float, seed: int) -> Split:
    """Hold out about `fraction` of the distinct prompts, at most 200; none below 10 prompts or at fraction 0."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.prompt_key, []).append(example)
    keys = list(groups)
    wanted = 0
    if fraction > 0 and len(keys) >= MIN_TO_SPLIT:
        wanted = min(MAX_HELD_OUT, max(1, round(len(keys) * fraction)))
    held = set(random.Random(seed).sample(keys, wanted))
    return Split(
        train=tuple(e for e in examples if e.prompt_key not in held),
        held_out=tuple(e for e in examples if e.prompt_key in held),
        duplicates=len(examples) - len(keys),
    )
