"""The optimizer and the learning rate's course. State is float32, or 8 bits in blocks (Dettmers et al. 2022); paged
state can leave a GPU under pressure (QLoRA, Dettmers et al. 2023), at the price of a launch for every weight. A CPU has
no such pressure: the plain forms run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from adaplex_adapters.errors import StartupError
from adaplex_adapters.training.options import TrainOptions

_BITSANDBYTES = {
    "paged_adamw": "PagedAdamW32bit",
    "paged_adam": "PagedAdam32bit",
    "adamw_8bit": "AdamW8bit",
    "adam_8bit": "Adam8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adam_8bit": "PagedAdam8bit",
}


def optimizer_name(options: TrainOptions, device: torch.device) -> str:
    """What runs on this device for what was asked."""
    asked = "adamw" if options.optimizer == "auto" else options.optimizer
    return asked if device.type == "cuda" else asked.removeprefix("paged_").removesuffix("_8bit")


def make_optimizer(
    trained: Sequence[torch.nn.Parameter], options: TrainOptions, rate: float, device: torch.device
) -> torch.optim.Optimizer:
    """Adam (decay in the gradient) or AdamW (decay beside it) over the adapter's weights. Raises StartupError where
    bitsandbytes is missing.
    """
    name = optimizer_name(options, device)
    settings: dict[str, Any] = {
        "lr": rate,
        "betas": (options.beta1, options.beta2),
        "eps": options.epsilon,
        "weight_decay": options.weight_decay,
    }
    if name not in _BITSANDBYTES:
        plain = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        return plain(trained, fused=device.type == "cuda", **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise StartupError(f"optimizer {name} needs bitsandbytes (extra 'train'); use adamw: {error}") from error
    made: torch.optim.Optimizer = getattr(bitsandbytes.optim, _BITSANDBYTES[name])(trained, **settings)
    return made


def rate_at(step: int, steps: int, warmup: float, schedule: str = "cosine") -> float:
    """Factor of the learning rate for step 0..steps-1: rises linearly over the warm-up (a share below 1, else a
    number of steps), then falls to zero along a cosine or a line, or stays.

    Transformers' schedules begin their warm-up at a rate of zero, where this one is a step ahead: no step is wasted.
    """
    rising = (max(1, round(steps * warmup)) if warmup > 0 else 0) if warmup < 1 else min(steps, round(warmup))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    if schedule == "constant":
        return 1.0
    return 1.0 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
