"""The loss of a frozen head with the gradient of its input made at once: logits exist for some rows at a time, once, in
the head's dtype, and become their own gradient in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def surprise_sum(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignored: int, rows: int) -> Any:
    """Sum (float32 scalar) of -log p(target). hidden: [n, H] on a GPU, `rows` of them at a time; weight: [V, H]."""
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    return _Surprise.apply(hidden, weight, targets, ignored, rows, wanted)


class _Surprise(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        ignored: int,
        rows: int,
        wanted: bool,
    ) -> torch.Tensor:
        from adaplex_adapters.training.fused import gpu_kernels

        slope = torch.empty_like(hidden) if wanted else None
        losses = []
        for begin in range(0, len(targets), rows):
            part = slice(begin, begin + rows)
            logits = torch.mm(hidden[part], weight.t())
            losses.append(gpu_kernels.surprise(logits, targets[part], ignored, wanted).sum())
            if slope is not None:
                torch.mm(logits, weight, out=slope[part])
            del logits
        if slope is not None:
            context.save_for_backward(slope)
        return torch.stack(losses).sum() if losses else hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (slope,) = context.saved_tensors
        return ((slope * gradients[0].to(slope.dtype)), None, None, None, None, None)
