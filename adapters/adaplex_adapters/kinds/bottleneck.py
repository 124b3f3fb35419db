"""Bottleneck adapters (Houlsby et al. 2019, Pfeiffer et al. 2020, parallel ones of He et al. 2021) in the layout of the
`adapters` library (adapter-hub, 1.x): adapter_config.json with its own keys, and adapter.safetensors.

Its configs can describe many placements of norms and residuals. On the models served here, whose norms stand before
each block, those that keep the block's residual connection as it is come down to three (see `spec.Bottleneck`), and
the others are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.fit import dimension_problems, wrong_base
from adaplex_adapters.kinds.reading import Reading, Source
from adaplex_adapters.peft_fields import CONFIG_FILE, FieldRules, field_problems, flag_problem, number_problem
from adaplex_adapters.problems import Gathered, raise_if_any, shown
from adaplex_adapters.spec import KIND_BOTTLENECK, Adapter, Bottleneck, Place, Reads, draft

ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {
        "relu": "relu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "silu": "silu",
        "swish": "silu",
        "tanh": "tanh",
        "sigmoid": "sigmoid",
        "leakyrelu": "leaky_relu",
    }
)
"""The library's name -> ours (of torch.nn.functional; gelu_tanh is gelu with approximate="tanh")."""

_RULES = FieldRules(
    read=frozenset(
        {
            "adapter_residual_before_ln",
            "architecture",
            "is_parallel",
            "leave_out",
            "mh_adapter",
            "non_linearity",
            "original_ln_after",
            "original_ln_before",
            "output_adapter",
            "reduction_factor",
            "residual_before_ln",
            "scaling",
        }
    ),
    harmless=frozenset(
        {
            "dropout",
            "factorized_phm_W",
            "factorized_phm_rule",
            "hypercomplex_nonlinearity",
            "init_weights",
            "init_weights_seed",
            "inv_adapter_reduction_factor",
            "learn_phm",
            "phm_bias",
            "phm_c_init",
            "phm_dim",
            "phm_init_range",
            "phm_rank",
            "shared_W_phm",
            "shared_phm_rule",
            "stochastic_depth",
        }
    ),
    refused={
        "phm_layer": "it is a Compacter (parameterized hypercomplex layers), a kind that is not served",
        "inv_adapter": "it has an invertible adapter at the embedding, which is not served",
        "use_gating": "its gate is a mean over the whole text, which an answer in the making does not have",
        "cross_adapter": "it adapts cross-attention, which decoders do not have",
        "ln_before": "it has a norm of its own before the bottleneck, which is not served",
        "ln_after": "it has a norm of its own after the bottleneck, which is not served",
    },
)
_KEY = re.compile(
    r"(?:[A-Za-z0-9_]+\.)*?(?:layers|h|blocks)\.(?P<layer>\d{1,4})\.(?P<place>attention|output)_adapters\.adapters\."
    r"(?P<name>.+)\.(?P<part>adapter_down\.0\.weight|adapter_down\.0\.bias|adapter_up\.weight|adapter_up\.bias|scaling)"
)
_PARTS = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
_PLACES: Mapping[str, Place] = MappingProxyType({"attention": "attention", "output": "mlp"})
# Families whose layers the library has rewritten; on all others it hooks into modules, as the user told it to.
_NATIVE = ("gpt2", "gptj", "llama", "mistral")
_MAX_FACTOR = 1e6

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
_ANY_MODEL = "adaplex.any"
"""In our own normalized folders: it fitted a base already, whose layers without a bottleneck have none."""


@dataclass(frozen=True)
class _Config:
    name: str
    model_type: str
    hidden_size: int
    activation: str
    reads: Reads
    places: frozenset[Place]
    left_out: frozenset[int]
    scaling: float | str
    factors: Mapping[str, float]
    base_model: str

    def width(self, layer: int) -> int:
        """m of a layer, as the library computes it."""
        factor = self.factors.get(str(layer), self.factors["default"])
        return max(1, int(self.hidden_size // factor))


@dataclass(frozen=True)
class _Fit:
    config: _Config

    def __call__(self, adapter: Adapter, base: BaseShape) -> None:
        config, found = self.config, adapter.bottlenecks
        problems = []
        anywhere = config.model_type == _ANY_MODEL
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
        }
        problems += [f"Layer {layer} has no {place} bottleneck." for layer, place in sorted(wanted - found.keys())]
        problems += [
            f"Layer {layer} has a {place} bottleneck that the base or {CONFIG_FILE} has no place for."
            for layer, place in sorted(found.keys() - wanted)
        ]
        raise_if_any(problems)


def read_bottleneck(source: Source) -> Reading:
    """A bottleneck adapter."""
    gathered = Gathered()
    config = gathered.step(_parse, source)
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


def _part_problems(at: tuple[int, Place], part: Parts, config: _Config) -> Iterator[str]:
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


def _bottleneck(part: Parts, config: _Config) -> Bottleneck:
    down, down_bias, up, up_bias = (part[name] for name in _PARTS)
    fixed = config.scaling
    scaling = part["scaling"].float() if isinstance(fixed, str) else torch.tensor([fixed], dtype=torch.float32)
    return Bottleneck(down, down_bias, up, up_bias, config.activation, scaling, config.reads)


def _parse(source: Source) -> _Config:
    fields = source.fields
    inner = fields.get("config")
    if not isinstance(inner, dict):
        raise_if_any([f"{CONFIG_FILE} has no config object, in which the adapters library describes an adapter."])
    inner = cast(dict[str, Any], inner)
    problems = [*_outer_problems(fields), *field_problems(inner, _RULES), *_value_problems(inner, source)]
    hooked = fields.get("model_type") not in (*_NATIVE, _ANY_MODEL)
    reads = _reads(inner, hooked)
    if reads is None:
        problems.append(
            f"{CONFIG_FILE} places norms and residuals (original_ln_before, original_ln_after, residual_before_ln, "
            f"is_parallel) in a way that is not served on a {shown(fields.get('model_type'))}; the library's seq_bn, "
            "double_seq_bn and par_bn are."
        )
    raise_if_any(problems)
    assert reads is not None
    places: tuple[tuple[str, Place], ...] = (("mh_adapter", "attention"), ("output_adapter", "mlp"))
    factor = inner["reduction_factor"]
    config = _Config(
        name=fields["name"],
        model_type=fields["model_type"],
        hidden_size=fields["hidden_size"],
        activation=ACTIVATIONS[inner["non_linearity"].lower()],
        reads=reads,
        places=frozenset(place for key, place in places if inner.get(key)),
        left_out=frozenset(inner.get("leave_out") or ()),
        scaling=inner.get("scaling", 1.0),
        factors=factor if isinstance(factor, dict) else {"default": factor},
        base_model=fields.get("model_name") or "",
    )
    widest = max(config.width(int(key) if key.isdecimal() else -1) for key in config.factors)
    if widest > source.limits.max_bottleneck:
        raise_if_any([f"A bottleneck is {widest} wide; widths up to {source.limits.max_bottleneck} are served."])
    return config


def _reads(inner: Mapping[str, Any], hooked: bool) -> Reads | None:
    """Where f(x) gets its x, when the stream after the block is s + h + f(x); None for everything else.

    The library computes, on a layer without a norm after its blocks, x = h + [before] s, a residual of h or (unless
    residual_before_ln) of x, and in the end adds s if original_ln_after. Where it hooks into modules, the norm that
    stands there may come in before x, and adding s is left to the model.
    """
    before, after = inner.get("original_ln_before", False), inner.get("original_ln_after", True)
    early = inner.get("residual_before_ln", True)
    if hooked:
        return "block" if not before and after is True and not inner.get("is_parallel") and early in (0, 1) else None
    if inner.get("is_parallel"):
        return "stream" if after is True else None
    if not before:
        return "block" if after is True and early in (0, 1) else None
    carries_stream = early is False
    return "sum" if early in (0, 1) and carries_stream != after else None


def _outer_problems(fields: Mapping[str, Any]) -> Iterator[str]:
    known = ("config", "hidden_size", "label2id", "model_class", "model_name", "model_type", "name", "version")
    for key, value in fields.items():
        if key not in known and value:
            yield f"{CONFIG_FILE} sets {shown(key)}={shown(value)}, which this version does not know."
    for key in ("name", "model_type"):
        value = fields.get(key)
        if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_\-.]{1,128}", value):
            yield f"{CONFIG_FILE} has {key}={shown(value)}; it must be a plain name."
    if type(hidden := fields.get("hidden_size")) is not int or not 1 <= hidden <= 1 << 20:
        yield f"{CONFIG_FILE} has hidden_size={shown(hidden)}; it must be a whole number."
    name = fields.get("model_name")
    if name is not None and not (isinstance(name, str) and len(name) <= 512 and name.isprintable()):
        yield f"{CONFIG_FILE} has the impossible model_name {shown(name)}."


def _value_problems(inner: Mapping[str, Any], source: Source) -> Iterator[str]:
    if inner.get("architecture") is not None:
        yield (
            f"{CONFIG_FILE} describes the {shown(inner['architecture'])} of the adapters library; of that library only "
            "bottleneck adapters are served. Train this kind with PEFT."
        )
    yield from flag_problem(
        inner, "mh_adapter", "output_adapter", "original_ln_before", "original_ln_after", "is_parallel"
    )
    if not inner.get("mh_adapter") and not inner.get("output_adapter"):
        yield f"{CONFIG_FILE} sets neither mh_adapter nor output_adapter, so there is no bottleneck."
    activation = inner.get("non_linearity")
    if not isinstance(activation, str) or activation.lower() not in ACTIVATIONS:
        yield f"{CONFIG_FILE} has non_linearity={shown(activation)}; served are {', '.join(ACTIVATIONS)}."
    scaling = inner.get("scaling", 1.0)
    if scaling not in ("learned", "channel"):
        yield from number_problem("scaling", scaling, 1e9)
    factors = inner.get("reduction_factor")
    values: dict[str, Any] = factors if isinstance(factors, dict) else {"default": factors}
    for key, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        number = number and 1 / _MAX_FACTOR <= value <= _MAX_FACTOR
        if not number or not (key == "default" or (key.isdecimal() and len(key) < 5)):
            yield f"{CONFIG_FILE} has the reduction_factor {shown(key)}: {shown(value)}, which is impossible."
    if "default" not in values:
        yield f"{CONFIG_FILE} has a reduction_factor for some layers and no default."
    left = inner.get("leave_out") or []
    if not isinstance(left, list) or not all(type(layer) is int for layer in left):
        yield f"{CONFIG_FILE} has leave_out={shown(left)}; it must be a list of layers' numbers."


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
        "model_type": _ANY_MODEL,
        "name": _NORMALIZED_NAME,
    }
    return config, tensors
