"""Mixed precision: the forward pass in half precision, weights and updates of the adapter in float32 (Micikevicius et
al. 2017). float16 needs its loss scaled, so that small gradients do not vanish.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from adaplex_adapters.training.options import TrainOptions


def mixed_dtype(options: TrainOptions, device: torch.device) -> torch.dtype | None:
    """What autocast multiplies in; None where it is off. On a CPU "auto" leaves it off: the base is kept in half
    precision there anyway, and the adapter's own products are small.
    """
    if options.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[options.precision]


def mixed(options: TrainOptions, device: torch.device) -> AbstractContextManager[object]:
    """The forward pass happens inside."""
    dtype = mixed_dtype(options, device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def loss_scaler(options: TrainOptions, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss for float16 alone; for all else it passes everything through."""
    return torch.amp.GradScaler(device.type, enabled=mixed_dtype(options, device) == torch.float16)
