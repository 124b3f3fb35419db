"""What may be chosen about a training run, checked when built. Owns nothing."""

from __future__ import annotations

from dataclasses import dataclass

from adaplex_adapters.errors import InvalidRequest

ALL_LINEAR = "all-linear"
MAX_RANK = 256


@dataclass(frozen=True)
class TrainOptions:
    """Defaults are meant to work untouched.

    rank, alpha: of the LoRA update alpha/rank * B A (alpha None: twice the rank). learning_rate: None derives it from
    the width of the base, see `learning_rate_for`. epochs, max_steps: the run ends at whichever comes first. A step
    is one update of the weights. batch_size, accumulation: rows a forward pass, passes a step. max_length: tokens;
    longer rows are left out and reported. warmup: share of the steps with rising rate; cosine to zero after. clip:
    largest norm of the gradient (0: no clipping). held_out: share of distinct prompts kept for measuring. targets:
    last parts of module names, or ("all-linear",). seed: of the split, the order and the first weights.
    """

    rank: int = 8
    alpha: float | None = None
    learning_rate: float | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    max_length: int = 1024
    warmup: float = 0.05
    weight_decay: float = 0.0
    dropout: float = 0.0
    clip: float = 1.0
    held_out: float = 0.05
    rslora: bool = False
    targets: tuple[str, ...] = (ALL_LINEAR,)
    seed: int = 0

    def __post_init__(self) -> None:
        _within("rank", self.rank, 1, MAX_RANK)
        _within("epochs", self.epochs, 0.001, 10_000)
        _within("batch_size", self.batch_size, 1, 4096)
        _within("accumulation", self.accumulation, 1, 4096)
        _within("max_length", self.max_length, 8, 1_000_000)
        _within("warmup", self.warmup, 0, 1)
        _within("weight_decay", self.weight_decay, 0, 10)
        _within("dropout", self.dropout, 0, 0.95)
        _within("clip", self.clip, 0, 1e6)
        _within("held_out", self.held_out, 0, 0.9)
        _within("seed", self.seed, 0, 2**32 - 1)
        if self.alpha is not None:
            _within("alpha", self.alpha, 1e-3, 1e5)
        if self.learning_rate is not None:
            _within("learning_rate", self.learning_rate, 1e-9, 10)
        if self.max_steps is not None:
            _within("max_steps", self.max_steps, 1, 10**9)
        if not self.targets or not all(self.targets):
            raise InvalidRequest("targets must name at least one module", param="targets")

    @property
    def lora_alpha(self) -> float:
        """alpha with its default applied."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


def learning_rate_for(hidden_size: int) -> float:
    """2e-4 at a width of 4096 (the rate of QLoRA, Dettmers 2023, for 7B and 13B), inversely with the width, at most
    2e-3.

    Small bases want higher rates: with 576 wide SmolLM2, 2e-4 leaves the demo tasks half learned in the same time.
    """
    return min(2e-3, 2e-4 * 4096 / hidden_size)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low} and {high}, not {value}", param=name)
