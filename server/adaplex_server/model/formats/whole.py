"""What linears share whose weight is one object of `kernels`, kept as the checkpoint has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch


class Weight(Protocol):
    """A quantized weight [out_features, in_features]."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        ...


W = TypeVar("W", bound=Weight)


@dataclass(frozen=True)
class WholeLinear(Generic[W]):
    """A `model.linear.Linear` but for how it multiplies and dequantizes. bias: [out_features] or None."""

    weight: W
    bias: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.weight.in_features

    @property
    def out_features(self) -> int:
        return self.weight.out_features

    def nbytes(self) -> int:
        return self.weight.nbytes() + (self.bias.nbytes if self.bias is not None else 0)
