"""What the scheduler keeps to: decided when the engine is assembled, and never changed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """max_scores: prompt tokens of a step whose log-probabilities are wanted, at most (each one costs a row of logits).

    eos: the model's own end tokens. max_context: tokens of a row, prompt and answer. vocab_size: token ids end below.
    max_wait: seconds in the queue: a row that is expected to wait for longer is refused at once, and one that has
    waited for longer, then; None for no such limit. few_tokens: a step of no more tokens costs little, and any larger
    one has a high cost of its own (see `prompt_share`); 0 where all are alike.
    """

    max_rows: int
    max_waiting: int
    max_step_tokens: int
    max_context: int
    max_scores: int
    page_size: int
    vocab_size: int
    eos: frozenset[int] = frozenset()
    max_wait: float | None = None
    few_tokens: int = 0
