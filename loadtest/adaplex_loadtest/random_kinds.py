"""Adapters of every kind with random weights, in memory, for a base with a llama's modules. Owns nothing.

They share their host tensors, and so do their layers, as only the places on the device matter for time; their revisions
are made up, as nothing stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.identity import described
from adaplex_adapters.spec import (
    KIND_BOTTLENECK,
    KIND_DORA,
    KIND_IA3,
    KIND_LORA,
    KIND_P_TUNING,
    KIND_PREFIX_TUNING,
    KIND_PROMPT_TUNING,
    Adapter,
    Bottleneck,
    LoraModule,
    Place,
    Scale,
    draft,
)

VIRTUAL_TOKENS = 16
_RSLORA = "rslora"


@dataclass(frozen=True)
class RandomKinds:
    """shape: of the base. rank: of the low-rank ones, on every linear. A bottleneck, before and after the MLP
    (Houlsby), is `width` wide, which makes it as large as the LoRA on a llama, give or take a third.
    """

    shape: BaseShape
    rank: int
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Of a bottleneck."""
        return min(4 * self.rank, self.shape.hidden_size)

    def made(self, kinds: Sequence[str], count: int, first: int = 0) -> list[Adapter]:
        """So many adapters, the kinds taking turns; their revisions count from `first`."""
        of_kind = {kind: self._one(kind) for kind in dict.fromkeys(kinds[:count])}
        found = []
        for i in range(count):
            one = of_kind[kinds[i % len(kinds)]]
            found.append(replace(one, spec=replace(one.spec, revision=f"{first + i:064x}")))
        return found

    def _one(self, kind: str) -> Adapter:
        return described(KINDS[kind](self))

    def _random(self, *size: int, deviation: float, mean: float = 0.0) -> torch.Tensor:
        return _normal(size, mean, deviation, self.dtype)

    def _near_one(self, count: int) -> torch.Tensor:
        return self._random(count, deviation=0.1, mean=1.0)

    def _lora(self, *, dora: bool = False, scaling: float = 2.0) -> Adapter:
        modules = {}
        for path, linear in self.shape.linears.items():
            a = self._random(self.rank, linear.in_features, deviation=linear.in_features**-0.5)
            b = self._random(linear.out_features, self.rank, deviation=0.02)
            modules[path] = LoraModule(a, b, scaling, self._near_one(linear.out_features) if dora else None)
        return Adapter(draft(KIND_DORA if dora else KIND_LORA, self.shape.name), modules)

    def _rslora(self) -> Adapter:
        return self._lora(scaling=2 * self.rank**0.5)

    def _dora(self) -> Adapter:
        return self._lora(dora=True)

    def _ia3(self) -> Adapter:
        """On what PEFT adapts in a llama unless told otherwise."""
        scales = {}
        for path, linear in self.shape.linears.items():
            if path.endswith(("k_proj", "v_proj")):
                scales[path] = Scale(self._near_one(linear.out_features), "output")
            elif path.endswith("down_proj"):
                scales[path] = Scale(self._near_one(linear.in_features), "input")
        return Adapter(draft(KIND_IA3, self.shape.name), scales=scales)

    def _prompt(self, kind: str) -> Adapter:
        return Adapter(
            draft(kind, self.shape.name), soft_prompt=self._random(VIRTUAL_TOKENS, self.shape.hidden_size, deviation=1)
        )

    def _prefix(self) -> Adapter:
        size = self.shape.num_layers, 2, VIRTUAL_TOKENS, self.shape.num_kv_heads, self.shape.head_dim
        return Adapter(draft(KIND_PREFIX_TUNING, self.shape.name), prefix=self._random(*size, deviation=1))

    def _bottleneck(self) -> Adapter:
        hidden, deviation = self.shape.hidden_size, self.shape.hidden_size**-0.5
        one = Bottleneck(
            down=self._random(self.width, hidden, deviation=deviation),
            down_bias=self._random(self.width, deviation=0.1),
            up=self._random(hidden, self.width, deviation=0.02),
            up_bias=self._random(hidden, deviation=0.1),
            activation="relu",
            scaling=torch.ones(1),
            reads="block",
        )
        layers = range(self.shape.num_layers)
        places: tuple[Place, ...] = ("attention", "mlp")
        found = {(layer, place): one for layer in layers for place in places}
        return Adapter(draft(KIND_BOTTLENECK, self.shape.name), bottlenecks=found)


@cache
def _normal(size: tuple[int, ...], mean: float, deviation: float, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator).mul_(deviation).add_(mean).to(dtype)


KINDS: dict[str, Callable[[RandomKinds], Adapter]] = {
    KIND_LORA: RandomKinds._lora,
    _RSLORA: RandomKinds._rslora,
    KIND_DORA: RandomKinds._dora,
    KIND_IA3: RandomKinds._ia3,
    KIND_PROMPT_TUNING: lambda kinds: kinds._prompt(KIND_PROMPT_TUNING),
    KIND_P_TUNING: lambda kinds: kinds._prompt(KIND_P_TUNING),
    KIND_PREFIX_TUNING: RandomKinds._prefix,
    KIND_BOTTLENECK: RandomKinds._bottleneck,
}


def parse_kinds(text: str) -> list[tuple[str, ...]]:
    """Sets of kinds: "all", or kinds with "+" between them; several sets with commas."""
    sets = [tuple(KINDS) if part == "all" else tuple(part.split("+")) for part in text.split(",")]
    for kind in {kind for one in sets for kind in one}:
        if kind not in KINDS:
            raise InvalidRequest(f"{kind!r} is no kind to measure; there are {', '.join(KINDS)} and all")
    return sets
