"""Several adapters as one: low-rank additions summed with weights, and what else they bring where it does not meet.

The sum of two LoRAs is the LoRA whose rank rows are those of both, so nothing is rounded away: PEFT's
`add_weighted_adapter` with combination_type="cat". What has no meaning as a sum is refused rather than given an order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.identity import described
from adaplex_adapters.spec import Adapter, LoraModule, draft

KIND_COMPOSITION = "composition"


@dataclass(frozen=True)
class Part:
    """One adapter of a composition. name: for messages. weight: what its low-rank additions are multiplied with."""

    name: str
    adapter: Adapter
    weight: float = 1.0


def compose(parts: Sequence[Part]) -> Adapter:
    """All parts at once. Its revision follows from the content, so from the parts' revisions, weights and order.

    Raises InvalidRequest, with every reason, when two parts change the same thing in ways that have no sum, or a weight
    is given to what cannot be scaled.
    """
    problems = [*_weight_problems(parts), *_meeting_problems(parts)]
    if problems:
        raise InvalidRequest("these adapters cannot be used together: " + "; ".join(problems))
    adapters = [part.adapter for part in parts]
    paths = dict.fromkeys(chain.from_iterable(adapter.modules for adapter in adapters))
    bases = {adapter.spec.base_model for adapter in adapters}
    whole = Adapter(
        draft(KIND_COMPOSITION, bases.pop() if len(bases) == 1 else ""),
        modules={path: _summed([p for p in parts if path in p.adapter.modules], path) for path in paths},
        scales={path: scale for adapter in adapters for path, scale in adapter.scales.items()},
        soft_prompt=next((a.soft_prompt for a in adapters if a.soft_prompt is not None), None),
        prefix=next((a.prefix for a in adapters if a.prefix is not None), None),
        bottlenecks={at: one for adapter in adapters for at, one in adapter.bottlenecks.items()},
        replaced={path: weight for adapter in adapters for path, weight in adapter.replaced.items()},
        base_copies={path: weight for adapter in adapters for path, weight in adapter.base_copies.items()},
    )
    return described(whole)


def _summed(parts: Sequence[Part], path: str) -> LoraModule:
    modules = [part.adapter.modules[path] for part in parts]
    if len(parts) == 1 and parts[0].weight == 1:
        return modules[0]
    # One scaling stays for all rank rows; each part's share goes into its B, in float32.
    shares = [float(np.float32(part.weight * module.scaling)) for part, module in zip(parts, modules, strict=True)]
    return LoraModule(
        a=torch.cat([module.a.float() for module in modules]),
        b=torch.cat([module.b.float() * share for module, share in zip(modules, shares, strict=True)], dim=1),
        scaling=1.0,
        embedding=modules[0].embedding,
    )


def _weight_problems(parts: Iterable[Part]) -> Iterator[str]:
    for part in parts:
        if not math.isfinite(part.weight):
            yield f"{part.name} has the weight {part.weight}"
        elif part.weight != 1 and not part.adapter.is_plain_lora:
            yield f"{part.name} is of kind {part.adapter.spec.kind}, which has no weight; only plain LoRA has"


def _meeting_problems(parts: Sequence[Part]) -> Iterator[str]:
    """Places that two parts change, unless both add a low-rank product there."""
    seen: dict[object, bool] = {}
    for part in parts:
        for place, shared in _places(part.adapter).items():
            if place in seen and not (shared and seen[place]):
                yield f"{part.name} and another of them change {place}"
            seen[place] = shared
    copies = {path for part in parts for path in part.adapter.base_copies}
    for path in sorted(copies & {path for part in parts for path in part.adapter.replaced}):
        yield f"{path} is replaced by one of them and expected to be the base's by another"


def _places(adapter: Adapter) -> dict[object, bool]:
    """What the adapter changes, and whether others may add to the same."""
    found: dict[object, bool] = {path: module.magnitude is None for path, module in adapter.modules.items()}
    found |= dict.fromkeys((*adapter.scales, *adapter.bottlenecks, *adapter.replaced), False)
    if adapter.soft_prompt is not None or adapter.prefix is not None:
        found["the place before the prompt"] = False
    return found
