"""The base model in memory: embedding, layers, norms and head, loaded once and never written to.

How a linear's weight is kept (dense, NF4, GPTQ) is its own business (`model.formats`); the decoder sees `Linear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adaplex_server.model.config import ModelConfig
from adaplex_server.model.linear import Linear


@dataclass(frozen=True)
class NormWeights:
    """weight, bias: [width], in the dtype of the activations; bias None where the norm has none."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def nbytes(self) -> int:
        """Bytes of both."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


@dataclass(frozen=True)
class LayerWeights:
    """norms: "attention", "mlp", "q", "k" as the family has them. linears: "qkv", "o", "gate_up" or "up", "down"."""

    norms: Mapping[str, NormWeights]
    linears: Mapping[str, Linear]

    def nbytes(self) -> int:
        """Bytes of all of the layer."""
        return sum(norm.nbytes() for norm in self.norms.values()) + sum(
            linear.nbytes() for linear in self.linears.values()
        )


@dataclass(frozen=True)
class Base:
    """embedding, head: [vocab_size, hidden_size] in the dtype of the activations; the same tensor where the head is tied.

    format: "none" (dense), "nf4", "nf4-double" or "gptq".
    """

    config: ModelConfig
    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: NormWeights
    head: torch.Tensor
    format: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.embedding.device

    def nbytes(self) -> int:
        """Bytes of memory that stay taken for the weights, a tied head counted once."""
        head = 0 if self.head is self.embedding else self.head.nbytes
        return self.embedding.nbytes + head + self.final_norm.nbytes() + sum(layer.nbytes() for layer in self.layers)
