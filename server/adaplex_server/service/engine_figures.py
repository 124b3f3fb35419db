"""What the engines of a service have told of their steps and of their adapters' ways, over all restarts.

Owned by the engine client, on the event loop: a few microseconds a step.
"""

from __future__ import annotations

from typing import Literal

from adaplex_server.engine.messages import AdapterMoved, StepFigures
from adaplex_server.service.histogram import POWERS_OF_TWO, STEP, SWAP, TOKENS, Histogram

Phase = Literal["prefill", "decode", "mixed"]


class EngineFigures:
    """step_seconds: by phase: all rows computed prompts, all rows decoded, or both were in the batch."""

    def __init__(self) -> None:
        self.step_seconds: dict[Phase, Histogram] = {phase: Histogram(STEP) for phase in ("prefill", "decode", "mixed")}
        self.step_rows = Histogram(POWERS_OF_TWO)
        self.step_adapters = Histogram((0.0, *POWERS_OF_TWO))
        self.step_tokens = Histogram(TOKENS)
        self.prefill_rows = 0
        self.decode_rows = 0
        self.base_rows = 0
        self.swaps: dict[str, Histogram] = {"read": Histogram(SWAP), "copy": Histogram(SWAP)}

    def on_step(self, step: StepFigures) -> None:
        """A step is over."""
        decoded = step.rows - step.prefill_rows
        self.step_seconds[_phase(step.prefill_rows, decoded)].observe(step.seconds)
        self.step_rows.observe(step.rows)
        self.step_adapters.observe(step.adapters)
        self.step_tokens.observe(step.tokens)
        self.prefill_rows += step.prefill_rows
        self.decode_rows += decoded
        self.base_rows += step.base_rows

    def on_moved(self, moved: AdapterMoved) -> None:
        """An adapter was read or copied."""
        self.swaps[moved.stage].observe(moved.seconds)


def _phase(prefill: int, decoded: int) -> Phase:
    if prefill and decoded:
        return "mixed"
    return "prefill" if prefill else "decode"
