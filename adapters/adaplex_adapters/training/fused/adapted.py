"""A frozen linear and the LoRAs on it, read off a module that PEFT or a bank of adapters has wrapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from adaplex_adapters.training.expanded_linear import ExpandedLinear


@dataclass(frozen=True)
class LowRank:
    """LoRAs of one rank, each for as many neighbouring rows as the others: y += scaling * B A x.

    a: [rank, in] float32 of each; b: [out, rank] of each; scalings: of each.
    """

    a: tuple[torch.Tensor, ...] = ()
    b: tuple[torch.Tensor, ...] = ()
    scalings: tuple[float, ...] = ()


@runtime_checkable
class LowRankHook(Protocol):
    """A forward hook that adds LoRAs, and can say which."""

    def low_rank(self) -> LowRank | None:
        """What it will add to the rows to come; None where that is no LowRank."""
        ...


@dataclass(frozen=True)
class Adapted:
    """linear: frozen. lora: what is added."""

    linear: torch.nn.Linear
    lora: LowRank

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in]."""
        if isinstance(self.linear, ExpandedLinear):
            return self.linear.dequantized(dtype)
        return self.linear.weight.to(dtype)


def read_adapted(module: Any) -> Adapted | None:
    """None for what must be called as it is: dropout, DoRA, several adapters on the same rows, other methods."""
    from peft.tuners.lora import Linear

    lora: LowRank | None = LowRank()
    if isinstance(module, Linear):
        lora = _of_peft(module)
        module = module.base_layer
    if lora is None or not (type(module) is torch.nn.Linear or isinstance(module, ExpandedLinear)):
        return None
    hooks = list(module._forward_hooks.values())
    if hooks:
        if len(hooks) > 1 or not isinstance(hooks[0], LowRankHook):
            return None
        lora = hooks[0].low_rank()
    return None if lora is None else Adapted(module, lora)


def _of_peft(module: Any) -> LowRank | None:
    if module.disable_adapters and not module.merged:
        return LowRank()
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.merged or module._forward_hooks or len(names) != 1 or names[0] in module.lora_variant:
        return None
    (name,) = names
    dropout, up = module.lora_dropout[name], module.lora_B[name]
    if (isinstance(dropout, torch.nn.Dropout) and dropout.p > 0 and module.training) or up.bias is not None:
        return None
    return LowRank((module.lora_A[name].weight,), (up.weight,), (float(module.scaling[name]),))
