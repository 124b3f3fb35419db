"""What a linear of the base can do, whatever its format. Implementations are in `model.formats`."""

from __future__ import annotations

from typing import Protocol

import torch


class Linear(Protocol):
    """A frozen linear, perhaps several of a checkpoint's fused along out-features. Read-only after load.

    A call maps x [T, in_features] to [T, out_features] in x's dtype, bias included. Each output row depends on its
    own input row only.
    """

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def bias(self) -> torch.Tensor | None:
        """[out_features], or None."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def dequantized(self) -> torch.Tensor:
        """The weight [out_features, in_features] in float32, exactly the values that the reference library would
        multiply with in float32.
        """
        ...

    def nbytes(self) -> int:
        """Bytes kept in memory for this linear."""
        ...
