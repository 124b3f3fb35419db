"""A composition of different kinds in our own layout: the normalized config of each, and their tensors under a prefix.

    adapter_config.json         {"peft_type": "COMPOSITION", "parts": [config, ...]}
    adapter_model.safetensors   "0.<name in the first part's own file>", "1....", ...

What lies in one part never meets what lies in another, so reading them is composing them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.composition import Part, compose
from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.identity import described
from adaplex_adapters.kinds.reading import KindReader, Reading, Source
from adaplex_adapters.peft_fields import CONFIG_FILE
from adaplex_adapters.problems import refuse, shown
from adaplex_adapters.spec import (
    KIND_BOTTLENECK,
    KIND_DORA,
    KIND_IA3,
    KIND_LORA,
    KIND_PREFIX_TUNING,
    KIND_PROMPT_TUNING,
    Adapter,
    draft,
)

PEFT_TYPE = "COMPOSITION"
MAX_PARTS = 6
"""One of each kind that `parts_of` tells apart."""


def parts_of(adapter: Adapter) -> list[Adapter]:
    """The adapter as adapters of one kind each, with nothing in common."""
    parts = list(_kinds_of(adapter))
    if adapter.replaced and parts:
        # Any kind that PEFT gives modules_to_save can carry them.
        carrier = next((i for i, p in enumerate(parts) if p.modules or p.scales), 0)
        parts[carrier] = replace(parts[carrier], replaced=adapter.replaced)
    return [described(part) for part in parts]


def _kinds_of(adapter: Adapter) -> Iterator[Adapter]:
    base = adapter.spec.base_model
    for kind, wanted in ((KIND_LORA, False), (KIND_DORA, True)):
        modules = {path: m for path, m in adapter.modules.items() if (m.magnitude is not None) == wanted}
        copies = {path: weight for path, weight in adapter.base_copies.items() if path in modules}
        if kind == KIND_LORA:
            copies |= {path: w for path, w in adapter.base_copies.items() if path not in adapter.modules}
        if modules:
            yield Adapter(draft(kind, base), modules=modules, base_copies=copies)
    if adapter.scales:
        yield Adapter(draft(KIND_IA3, base), scales=adapter.scales)
    if adapter.soft_prompt is not None:
        yield Adapter(draft(KIND_PROMPT_TUNING, base), soft_prompt=adapter.soft_prompt)
    if adapter.prefix is not None:
        yield Adapter(draft(KIND_PREFIX_TUNING, base), prefix=adapter.prefix)
    if adapter.bottlenecks:
        yield Adapter(draft(KIND_BOTTLENECK, base), bottlenecks=adapter.bottlenecks)


def joined(
    parts: list[tuple[dict[str, Any], dict[str, torch.Tensor]]],
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of the whole, from those of the parts."""
    tensors = {f"{number}.{name}": tensor for number, (_, own) in enumerate(parts) for name, tensor in own.items()}
    return {"peft_type": PEFT_TYPE, "parts": [config for config, _ in parts]}, tensors


def read_composition(source: Source, reader_of: Callable[[Mapping[str, Any]], KindReader]) -> Reading:
    """Raises InvalidAdapter with what is wrong in the first part that is."""
    configs = source.fields.get("parts")
    if (
        not isinstance(configs, list)
        or not 1 <= len(configs) <= MAX_PARTS
        or set(source.fields) != {"peft_type", "parts"}
    ):
        raise refuse(f"{CONFIG_FILE} of a composition holds peft_type and 1 to {MAX_PARTS} parts, and nothing else.")
    strays = [name for name in source.tensors if name.partition(".")[0] not in map(str, range(len(configs)))]
    if strays:
        raise refuse(f"Tensor {shown(strays[0])} belongs to no part of the composition.")
    readings = [_part(source, number, config, reader_of) for number, config in enumerate(configs)]
    try:
        whole = compose([Part(f"part {number}", described(one.adapter)) for number, one in enumerate(readings)])
    except InvalidRequest as error:
        raise refuse(error.message) from None

    def fit(_: Adapter, base: BaseShape) -> None:
        for reading in readings:
            reading.fit(reading.adapter, base)

    return Reading(whole, fit)


def _part(source: Source, number: int, config: object, reader_of: Callable[[Mapping[str, Any]], KindReader]) -> Reading:
    if not isinstance(config, dict) or config.get("peft_type") == PEFT_TYPE:
        raise refuse(f"{CONFIG_FILE}: part {number} of the composition is not the config of an adapter.")
    start = f"{number}."
    tensors = {name[len(start) :]: tensor for name, tensor in source.tensors.items() if name.startswith(start)}
    reading = reader_of(config)(Source(config, tensors, source.limits, source.budget))
    if reading.cut is not None:
        raise refuse(f"{CONFIG_FILE}: part {number} of the composition is of a kind that must be loaded by itself.")
    return reading
