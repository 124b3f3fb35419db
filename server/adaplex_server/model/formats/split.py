"""A fused linear whose parts cannot be stored as one: they are called one after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaplex_server.model.linear import Linear


@dataclass(frozen=True)
class SplitLinear:
    """parts: linears of one input, stacked along out-features."""

    parts: tuple[Linear, ...]

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    @property
    def bias(self) -> torch.Tensor | None:
        """Those of the parts, side by side; a part without one has zeros."""
        if all(part.bias is None for part in self.parts):
            return None
        like = next(part.bias for part in self.parts if part.bias is not None)
        zeros = [like.new_zeros(part.out_features) if part.bias is None else part.bias for part in self.parts]
        return torch.cat(zeros)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)

    def dequantized(self) -> torch.Tensor:
        return torch.cat([part.dequantized() for part in self.parts])

    def nbytes(self) -> int:
        return sum(part.nbytes() for part in self.parts)
