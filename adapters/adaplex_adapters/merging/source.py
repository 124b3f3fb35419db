"""Where a merge reads the base from. Implemented by whoever can read the base's format; nothing here knows one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch


class WeightSource(Protocol):
    """The base as a dense checkpoint would have it, a tensor at a time, read from its own format when asked for."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor of the standalone checkpoint ("model.layers.0.self_attn.q_proj.weight") with its shape, in the
        order in which they are to be written. Reads no values.
        """
        ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor's values on the CPU: of a quantized weight, its exact dequantized values in float32; of any
        other, what is stored.
        """
        ...
