"""The training loop: batches in, one report a step out. Owns the optimizer; changes only the adapter's weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.answer_loss import answer_loss
from adaplex_adapters.training.batches import Batch
from adaplex_adapters.training.options import TrainOptions


@dataclass(frozen=True)
class StepReport:
    """step counts from 1. loss: mean over the step's learned tokens (nats). tokens: real tokens the step read."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int


def rate_at(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate for step 0..steps-1: rises linearly over the warm-up share, then falls along a
    cosine.
    """
    rising = max(1, round(steps * warmup)) if warmup > 0 else 0
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def training_steps(
    model: Any, batches: Iterator[Batch], options: TrainOptions, steps: int, rate: float, device: torch.device
) -> Iterator[StepReport]:
    """Run `steps` updates, yielding after each. A step's gradient is the mean over all learned tokens of its batches.

    Raises InvalidRequest when the loss is no longer finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, rate, options.weight_decay, device)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps, options.warmup))
    model.train()
    for step in range(1, steps + 1):
        group = list(itertools.islice(batches, options.accumulation))
        learned = sum(b.learned for b in group)
        total = 0.0
        for batch in group:
            loss = answer_loss(model, batch, device) / learned
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise InvalidRequest(
                f"training diverged: the loss of step {step} is {total}; use a lower learning rate than {rate:g}",
                param="learning_rate",
            )
        norm = float(torch.nn.utils.clip_grad_norm_(trained, options.clip or math.inf))
        used = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        yield StepReport(step, total, float(used), norm, sum(b.tokens for b in group))


def make_optimizer(
    trained: list[torch.nn.Parameter], rate: float, weight_decay: float, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW with float32 state; on a GPU bitsandbytes' paged form, whose state can leave the device under pressure."""
    if device.type == "cuda":
        from bitsandbytes.optim import PagedAdamW32bit

        paged: torch.optim.Optimizer = PagedAdamW32bit(trained, lr=rate, weight_decay=weight_decay)
        return paged
    return torch.optim.AdamW(trained, lr=rate, weight_decay=weight_decay)


@torch.no_grad()
def mean_loss(model: Any, batches: Iterable[Batch], device: torch.device) -> float:
    """Mean -log p over all learned tokens of the batches (nats); the model is left in eval mode."""
    model.eval()
    total, learned = 0.0, 0
    for batch in batches:
        total += float(answer_loss(model, batch, device))
        learned += batch.learned
    return total / learned
