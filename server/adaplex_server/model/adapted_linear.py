"""A linear of the base with the adapters of its tokens: the one place that chooses how both are multiplied."""

from __future__ import annotations

import torch

from adaplex_server.kernels.lora import LoraPlan, add_lora
from adaplex_server.model.linear import Linear


def adapted_linear(base: Linear, x: torch.Tensor, lora: LoraPlan | None, linear: str, layer: int) -> torch.Tensor:
    """x [T, K] to [T, N]: the base's output plus the delta of each token's own adapter.

    lora: None where no token has an adapter. linear, layer: where `base` stands in the decoder, which is how the plan
    finds the adapters' rank rows.
    """
    y = base(x)
    if lora is not None:
        add_lora(y, x, lora, linear, layer)
    return y
