"""How good an adapter is on rows that it has not seen: loss, and metrics of greedy answers; the base beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from adaplex_adapters.training.answer_loss import base_loss
from adaplex_adapters.training.batches import ordered_batches
from adaplex_adapters.training.conversations import answer_of
from adaplex_adapters.training.evaluation import greedy_answers
from adaplex_adapters.training.frozen_base import FrozenBase
from adaplex_adapters.training.loop import mean_loss
from adaplex_adapters.training.methods.adapter import TrainedAdapter
from adaplex_adapters.training.metrics import find_metric
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.precision import mixed
from adaplex_adapters.training.rows import Rows


@dataclass(frozen=True)
class Measurement:
    """loss: mean over the held-out answers' tokens (nats). metrics: name -> figure. answers: to rows.asked."""

    step: int
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    answers: tuple[str, ...] = ()

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(min(self.loss, 700.0))

    def figure(self, name: str) -> float:
        """What is compared, lower is better: the loss, or a metric's negative."""
        return self.loss if name == "loss" else -self.metrics[name]

    def plain(self) -> dict[str, Any]:
        """As JSON has it, without the answers."""
        return {"step": self.step, "loss": self.loss, "perplexity": self.perplexity, "metrics": dict(self.metrics)}


class Measuring:
    """Measures one adapter on one set of rows. Owns nothing."""

    def __init__(self, base: FrozenBase, adapter: TrainedAdapter, rows: Rows, options: TrainOptions, pad: int) -> None:
        self._base, self._adapter, self._rows, self._options, self._pad = base, adapter, rows, options, pad
        self._metrics = {name: find_metric(name) for name in options.metrics}

    def adapter(self, step: int) -> Measurement | None:
        """The adapter as it stands; None without held-out rows."""
        if not self._rows.held_out:
            return None
        loss = mean_loss(self._adapter, self._batches(), self._options, self._base.device)
        return Measurement(step, loss, *self._answered())

    @torch.no_grad()
    def base_alone(self) -> Measurement | None:
        """The base without the adapter."""
        if not self._rows.held_out:
            return None
        self._adapter.model.eval()
        total, learned = 0.0, 0
        with self._adapter.disabled():
            for batch in self._batches():
                with mixed(self._options, self._base.device):
                    total += float(base_loss(self._adapter.causal, batch, self._base.device))
                learned += batch.learned
            return Measurement(0, total / max(1, learned), *self._answered())

    def _batches(self) -> Any:
        return ordered_batches(self._rows.held_out, self._options.eval_batch_size, self._pad)

    def _answered(self) -> tuple[dict[str, float], tuple[str, ...]]:
        asked = self._rows.asked
        if not self._metrics or not asked:
            return {}, ()
        standing = dataclasses.replace(self._base, model=self._adapter.model)
        answers = greedy_answers(standing, asked, self._options.eval_batch_size)
        wanted = [answer_of(example) for example in asked]
        return {name: metric(answers, wanted) for name, metric in self._metrics.items()}, tuple(answers)
