"""What a kind is given to read, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adaplex_adapters.automaton import WorkBudget
from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.spec import Adapter


@dataclass(frozen=True)
class Source:
    """The folder's two files: the config's fields and the tensors by name. budget: for expressions in the config."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    limits: ReadLimits
    budget: WorkBudget


@dataclass(frozen=True)
class Reading:
    """adapter: its spec is a draft. fit: raises InvalidAdapter unless the adapter fits the base, with every reason.
    cut: takes the part of the adapter that this base needs, for a kind whose files are made for the largest module.
    """

    adapter: Adapter
    fit: Callable[[Adapter, BaseShape], None]
    cut: Callable[[Adapter, BaseShape], Adapter] | None = None


KindReader = Callable[[Source], Reading]
"""Raises InvalidAdapter with everything that is wrong."""
