"""What the trainer asks of an adapter under training, whatever its kind."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class AdapterFiles:
    """What is written: tensors (on the CPU, in the saved dtype) and config (JSON), with the names of their files."""

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    tensor_file: str
    config_file: str


@dataclass(frozen=True)
class ModelInputs:
    """Keyword arguments for the causal LM, and how many positions its output has before the first token's."""

    arguments: Mapping[str, Any]
    virtual: int = 0


class TrainedAdapter(Protocol):
    """Fresh weights around a base. model: what generates; causal: the transformers causal LM inside it."""

    @property
    def model(self) -> Any: ...

    @property
    def causal(self) -> Any: ...

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The weights that are learned, float32, in an order that never changes."""
        ...

    def inputs(self, ids: torch.Tensor) -> ModelInputs:
        """What the causal LM is called with for token ids [rows, tokens]."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the base answers alone."""
        ...

    def settle(self, dtype: torch.dtype) -> None:
        """Round to what the files will hold, so that what is measured is what is saved. Ends training."""
        ...

    def files(self, base_name: str, dtype: torch.dtype) -> AdapterFiles:
        """The adapter as it is saved."""
        ...

    def detach(self) -> None:
        """Take everything out of the base again: it is then what it was before."""
        ...
