"""The families by name, and what follows from a family's row (`model.family_rows`) and a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from adaplex_adapters.base_shape import BaseShape, LinearShape
from adaplex_server.model.family import Family
from adaplex_server.model.family_rows import ROWS

if TYPE_CHECKING:
    from adaplex_server.model.config import ModelConfig

FAMILIES: Mapping[str, Family] = MappingProxyType({row.name: row for row in ROWS})


@dataclass(frozen=True)
class LinearTargets:
    """The targets fused in one linear: their names ("q_proj", ...), and where each one's outputs begin and end in the
    outputs of the whole linear ([begin, end)).
    """

    names: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    in_features: int
    out_features: int


def linear_widths(config: ModelConfig, linear: str) -> tuple[tuple[int, ...], int]:
    """Out-features of each module fused in `linear`, in order, and their common in-features."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    count = len(FAMILIES[config.family].linears[linear])
    widths = {
        "qkv": ((q_width, kv_width, kv_width), hidden),
        "o": ((hidden,), q_width),
        "gate_up": ((inner, inner), hidden),
        "up": ((inner,), hidden),
        "down": ((hidden,), inner),
    }
    parts, in_features = widths[linear]
    return (parts if count == len(parts) else (sum(parts),)), in_features


def linear_targets(config: ModelConfig) -> dict[str, LinearTargets]:
    """The hot-path linears in the order of the forward pass, each with its modules' last names ("q_proj") and spans."""
    found: dict[str, LinearTargets] = {}
    for linear, modules in FAMILIES[config.family].linears.items():
        widths, in_features = linear_widths(config, linear)
        spans: list[tuple[int, int]] = []
        for width in widths:
            begin = spans[-1][1] if spans else 0
            spans.append((begin, begin + width))
        names = tuple(module.rpartition(".")[2] for module in modules)
        found[linear] = LinearTargets(names, tuple(spans), in_features, spans[-1][1])
    return found


def layer_path(config: ModelConfig, layer: int) -> str:
    """Module path of a layer ("model.layers.0")."""
    return FAMILIES[config.family].layer.format(layer)


def module_paths(config: ModelConfig, layer: int, linear: str) -> tuple[str, ...]:
    """Module paths in the checkpoint ("model.layers.0.self_attn.q_proj", ...) that `linear` fuses, in order;
    parameters are PATH.weight and PATH.bias.
    """
    return tuple(f"{layer_path(config, layer)}.{module}" for module in FAMILIES[config.family].linears[linear])


def norm_path(config: ModelConfig, layer: int, norm: str) -> str:
    """Module path in the checkpoint of a layer's norm (as `model.family` names them)."""
    return f"{layer_path(config, layer)}.{FAMILIES[config.family].norms[norm]}"


def base_shape(config: ModelConfig) -> BaseShape:
    """What an adapter must fit: every adaptable linear with its features, in the order of the forward pass."""
    linears: dict[str, LinearShape] = {}
    for layer in range(config.num_layers):
        for linear, targets in linear_targets(config).items():
            for path, (begin, end) in zip(module_paths(config, layer, linear), targets.spans, strict=True):
                linears[path] = LinearShape(out_features=end - begin, in_features=targets.in_features)
    return BaseShape(
        name=config.name,
        family=config.family,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        linears=MappingProxyType(linears),
        embedding=FAMILIES[config.family].embedding,
        head="lm_head",  # as transformers calls every head in memory, and so PEFT
        tied_head=config.tied_head,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
