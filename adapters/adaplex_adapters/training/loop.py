"""The steps of training. `Course` owns the optimizer and the number of the step; it changes only the adapter's
weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.answer_loss import answer_loss
from adaplex_adapters.training.batches import Batch
from adaplex_adapters.training.methods.adapter import TrainedAdapter
from adaplex_adapters.training.micro_batch_graphs import MicroBatchGraphs, SteadyGradients, can_record
from adaplex_adapters.training.optimizers import make_optimizer, rate_at
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.precision import loss_scaler, mixed


@dataclass(frozen=True)
class StepReport:
    """step counts from 1. loss: mean over the step's learned tokens (nats). tokens: real tokens the step read."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int


@dataclass(frozen=True)
class CourseState:
    """All that the next step depends on, besides the weights and the batches: tensors by name, and plain numbers."""

    step: int
    tensors: dict[str, torch.Tensor]
    numbers: dict[str, Any]


class Course:
    """A run of `steps` updates with the highest learning rate `rate`, from step 0 or from a restored state. graphs:
    make gradients as CUDA graphs where that pays.
    """

    def __init__(
        self,
        adapter: TrainedAdapter,
        options: TrainOptions,
        steps: int,
        rate: float,
        device: torch.device,
        graphs: bool = True,
    ) -> None:
        self._adapter, self._options, self._device = adapter, options, device
        self._steps, self._rate, self.step = steps, rate, 0
        self._trained = list(adapter.trained().values())
        self._optimizer = make_optimizer(self._trained, options, rate, device)
        self._scaler = loss_scaler(options, device)
        self._loss = torch.zeros((), device=device)
        graphs = graphs and can_record(adapter.causal, options, device)
        self._steady = SteadyGradients(self._trained) if graphs else None
        self._graphs = MicroBatchGraphs(adapter.causal, options, device) if graphs else None

    def advance(self, batches: Iterator[Batch]) -> StepReport:
        """One update from the next `accumulation` batches. Its gradient is the mean over all their learned tokens.

        Raises InvalidRequest when the loss is no longer finite.
        """
        group = self.take(batches)
        self.learn(group)
        return self.update(group)

    def take(self, batches: Iterator[Batch]) -> list[Batch]:
        """The batches of the next step."""
        return list(itertools.islice(batches, self._options.accumulation))

    def learn(self, group: Sequence[Batch]) -> None:
        """Forward and backward over the batches of a step."""
        self._adapter.model.train()
        for batch in group:
            found = None if self._graphs is None else self._graphs.learn(batch, [share_factor(group)])
            if found is not None:
                self.note(found.sum())
                continue
            with mixed(self._options, self._device):
                loss = answer_loss(self._adapter, batch, self._device)
            self.share_of(loss, group).backward()

    def share_of(self, loss: torch.Tensor, group: Sequence[Batch]) -> torch.Tensor:
        """What one batch's summed loss adds to the step's, to call backward on; it is remembered for the report."""
        share = loss * share_factor(group)
        self.note(share.detach())
        return self._scaler.scale(share)

    def note(self, share: torch.Tensor) -> None:
        """Remember for the report what one batch's loss adds to the step's."""
        self._loss = self._loss + share

    def update(self, group: Sequence[Batch]) -> StepReport:
        """Change the weights by the gradients that are there. Raises InvalidRequest when the loss is not finite."""
        used = self._rate * rate_at(self.step, self._steps, self._options.warmup, self._options.schedule)
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self._options.clip or math.inf)
        loss, self._loss = float(self._loss), torch.zeros((), device=self._device)
        if not math.isfinite(loss):
            raise InvalidRequest(
                f"training diverged: the loss of step {self.step + 1} is {loss}; use a lower learning rate than "
                f"{self._rate:g}",
                param="learning_rate",
            )
        for settings in self._optimizer.param_groups:
            settings["lr"] = used
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._steady is None:
            self._optimizer.zero_grad(set_to_none=True)
        else:
            self._steady.zero()
        self.step += 1
        return StepReport(self.step, loss, used, float(norm), sum(b.tokens for b in group))

    def state(self) -> CourseState:
        """A copy that later steps do not change."""
        tensors = {"random.cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self._device)
        numbers: dict[str, Any] = {"scaler": self._scaler.state_dict(), "optimizer": {}}
        for index, values in self._optimizer.state_dict()["state"].items():
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value.detach().cpu().clone()
                else:
                    numbers["optimizer"][f"{index}.{key}"] = value
        return CourseState(self.step, tensors, numbers)

    def restore(self, state: CourseState) -> None:
        """Go on as the course that `state` was taken from would have."""
        values: dict[int, dict[str, Any]] = {}
        held = [(n.removeprefix("optimizer."), t) for n, t in state.tensors.items() if n.startswith("optimizer.")]
        for name, value in (*held, *state.numbers["optimizer"].items()):
            index, _, key = name.partition(".")
            values.setdefault(int(index), {})[key] = value.clone() if isinstance(value, torch.Tensor) else value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": values, "param_groups": groups})
        self._scaler.load_state_dict(state.numbers["scaler"])
        torch.set_rng_state(state.tensors["random.cpu"])
        if "random.cuda" in state.tensors and self._device.type == "cuda":
            torch.cuda.set_rng_state(state.tensors["random.cuda"], self._device)
        self.step = state.step


def share_factor(group: Sequence[Batch]) -> float:
    """What a batch's summed loss is multiplied with, so that those of a step make the mean over its learned tokens."""
    return 1 / max(1, sum(b.learned for b in group))


@torch.no_grad()
def mean_loss(adapter: TrainedAdapter, batches: Iterable[Batch], options: TrainOptions, device: torch.device) -> float:
    """Mean -log p over all learned tokens of the batches (nats); the model is left in eval mode."""
    adapter.model.eval()
    total, learned = 0.0, 0
    for batch in batches:
        with mixed(options, device):
            total += float(answer_loss(adapter, batch, device))
        learned += batch.learned
    return total / max(1, learned)
