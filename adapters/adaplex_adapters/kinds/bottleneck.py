"""Bottleneck adapters (Houlsby et al. 2019, Pfeiffer et al. 2020, parallel ones of He et al. 2021) in the layout of the
`adapters` library: adapter_config.json with its own keys, and adapter.safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.fit import dimension_problems, wrong_base
from adaplex_adapters.kinds.bottleneck_config import ACTIVATIONS, ANY_MODEL, BottleneckConfig, parse_bottleneck_config
from adaplex_adapters.kinds.reading import Reading, Source
from adaplex_adapters.peft_fields import CONFIG_FILE
from adaplex_adapters.problems import Gathered, raise_if_any, shown
from adaplex_adapters.spec import KIND_BOTTLENECK, Adapter, Bottleneck, Place, Reads, draft

_KEY = re.compile(
    r"(?:[A-Za-z0-9_]+\.)*?(?:layers|h|blocks)\.(?P<layer>\d{1,4})\.(?P<place>attention|output)_adapters\.adapters\."
    r"(?P<name>.+)\.(?P<part>adapter_down\.0\.weight|adapter_down\.0\.bias|adapter_up\.weight|adapter_up\.bias|scaling)"
)
_PARTS = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
_PLACES: Mapping[str, Place] = MappingProxyType({"attention": "attention", "output": "mlp"})
Parts = dict[str, torch.Tensor]
# A config of the library for each of what a bottleneck reads.
_PLACEMENTS: Mapping[Reads, Mapping[str, bool]] = MappingProxyType(
    {
        "block": {"original_ln_before": False, "is_parallel": False},
        "sum": {"original_ln_before": True, "is_parallel": False},
        "stream": {"original_ln_before": False, "is_parallel": True},
    }
)
_NORMALIZED_NAME = "adapter"


@dataclass(frozen=True)
class _Fit:
    config: BottleneckConfig

    def __call__(self, adapter: Adapter, base: BaseShape) -> None:
        config, found = self.config, adapter.bottlenecks
        problems = []
        anywhere = config.model_type == ANY_MODEL
        if not (anywhere or config.model_type == base.family) or config.hidden_size != base.hidden_size:
            problems.append(wrong_base(config.base_model, base))
            problems.append(
                f"It was trained on a {shown(config.model_type)} of {config.hidden_size} features; the base is a "
                f"{base.family} of {base.hidden_size}."
            )
        wanted = {
            (layer, place)
            for layer in range(base.num_layers)
            if layer not in config.left_out
            for place in config.places
            if not anywhere or (layer, place) in found
        }
        problems += [f"Layer {layer} has no {place} bottleneck." for layer, place in sorted(wanted - found.keys())]
        problems += [
            f"Layer {layer} has an {place} bottleneck that the base or {CONFIG_FILE} has no place for."
            for layer, place in sorted(found.keys() - wanted)
        ]
        raise_if_any(problems)


def read_bottleneck(source: Source) -> Reading:
    """A bottleneck adapter."""
    gathered = Gathered()
    config = gathered.step(parse_bottleneck_config, source)
    parts = gathered.step(_sorted, source.tensors)
    gathered.raise_if_any()
    assert config is not None and parts is not None
    found, names = parts
    problems = [f"The tensors are of an adapter {shown(n)}; {CONFIG_FILE} names {shown(config.name)}." for n in names]
    if names == {config.name}:
        problems = []
    problems += [p for at, part in found.items() for p in _part_problems(at, part, config)]
    raise_if_any(problems)
    bottlenecks = {at: _bottleneck(part, config) for at, part in sorted(found.items())}
    adapter = Adapter(draft(KIND_BOTTLENECK, config.base_model), bottlenecks=bottlenecks)
    return Reading(adapter, _Fit(config))


def _sorted(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[tuple[int, Place], Parts], set[str]]:
    """((layer, place) -> part -> tensor, the adapter's names)."""
    found: dict[tuple[int, Place], Parts] = {}
    names: set[str] = set()
    problems = [] if tensors else ["The adapter holds no tensors."]
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"Tensor {key} would stay unused: it is no part of a bottleneck after a block.")
            continue
        parts = found.setdefault((int(match["layer"]), _PLACES[match["place"]]), {})
        if match["part"] in parts:
            problems.append(f"Tensor {key} is there twice under different names.")
        parts[match["part"]] = tensor
        names.add(match["name"])
    raise_if_any(problems)
    return found, names


def _part_problems(at: tuple[int, Place], part: Parts, config: BottleneckConfig) -> Iterator[str]:
    layer, hidden = at[0], config.hidden_size
    where = f"layer {layer}'s {at[1]} bottleneck"
    width = config.width(layer)
    shapes = dict(zip(_PARTS, ([width, hidden], [width], [hidden, width], [hidden]), strict=True))
    if isinstance(config.scaling, str):
        shapes["scaling"] = [1 if config.scaling == "learned" else hidden]
    for name, shape in shapes.items():
        if name not in part:
            yield f"The {name} of {where} is missing."
        elif list(part[name].shape) != shape:
            yield f"The {name} of {where} has shape {list(part[name].shape)}; {CONFIG_FILE} gives it {shape}."
    if "scaling" in part and "scaling" not in shapes:
        yield f"The scaling of {where} would stay unused: {CONFIG_FILE} says {config.scaling}."
    for name in part:
        yield from dimension_problems(f"{name} of {where}", part[name], 2 if name.endswith("weight") else 1)


def _bottleneck(part: Parts, config: BottleneckConfig) -> Bottleneck:
    down, down_bias, up, up_bias = (part[name] for name in _PARTS)
    fixed = config.scaling
    scaling = part["scaling"].float() if isinstance(fixed, str) else torch.tensor([fixed], dtype=torch.float32)
    return Bottleneck(down, down_bias, up, up_bias, config.activation, scaling, config.reads)


def normalized_bottleneck(adapter: Adapter) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(config, tensors) in the library's layout, for any model whose layers have the places that are there.

    Widths are written as reduction factors, and every scaling as a trained one.
    """
    one = next(iter(adapter.bottlenecks.values()))
    hidden = one.up.shape[0]
    places = {place for _, place in adapter.bottlenecks}
    tensors: dict[str, torch.Tensor] = {}
    for (layer, place), found in sorted(adapter.bottlenecks.items()):
        library = next(name for name, ours in _PLACES.items() if ours == place)
        key = f"model.layers.{layer}.{library}_adapters.adapters.{_NORMALIZED_NAME}."
        values = found.down, found.down_bias, found.up, found.up_bias, found.scaling
        tensors |= {f"{key}{name}": tensor for name, tensor in zip((*_PARTS, "scaling"), values, strict=True)}
    widths = {layer: found.down.shape[0] for (layer, _), found in adapter.bottlenecks.items()}
    inner = {
        "mh_adapter": "attention" in places,
        "non_linearity": next(name for name, ours in ACTIVATIONS.items() if ours == one.activation),
        "original_ln_after": True,
        "output_adapter": "mlp" in places,
        # The half keeps the rounding down of the quotient at the width.
        "reduction_factor": {"default": hidden} | {str(at): hidden / (width + 0.5) for at, width in widths.items()},
        "residual_before_ln": True,
        "scaling": "learned" if one.scaling.shape[0] == 1 else "channel",
        **_PLACEMENTS[one.reads],
    }
    config = {
        "config": inner,
        "hidden_size": hidden,
        "model_name": adapter.spec.base_model or None,
        "model_type": ANY_MODEL,
        "name": _NORMALIZED_NAME,
    }
    return config, tensors
