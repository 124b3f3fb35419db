"""Linears kept as they are, in the dtype of the activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaplex_server.kernels import dense


@dataclass(frozen=True)
class DenseLinear:
    """weight: [out_features, in_features], bias: [out_features] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return dense.linear(x, self.weight, self.bias)

    def dequantized(self) -> torch.Tensor:
        return self.weight.float()

    def nbytes(self) -> int:
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)
