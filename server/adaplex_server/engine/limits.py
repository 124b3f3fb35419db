"""What the scheduler keeps to: decided when the engine is assembled, and never changed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """max_scores: prompt tokens of a step whose log-probabilities are wanted, at most (each one costs a row of logits).

    eos: the model's own end tokens. max_context: tokens of a row, prompt and answer. vocab_size: token ids end below.
    max_wait: seconds in the queue: a row that is expected to wait for longer is refused at once, and one that has
    waited for longer, then; None for no such limit. prompt_turns: rows begin together after pauses (see `PromptTurns`).
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
    prompt_turns: bool = False
