"""The config of a bottleneck adapter, in the keys of the `adapters` library (adapter-hub, 1.x).

Such a config can describe many placements of norms and residuals. On the models served here, whose norms stand before
each block, those that keep the block's residual connection as it is come down to three (see `spec.Bottleneck`), and
the others are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from adaplex_adapters.kinds.reading import Source
from adaplex_adapters.peft_fields import CONFIG_FILE, FieldRules, field_problems, flag_problem, number_problem
from adaplex_adapters.problems import raise_if_any, shown
from adaplex_adapters.spec import Place, Reads

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
# Families whose layers the library has rewritten; on all others it hooks into modules, as the user told it to.
_NATIVE = ("gpt2", "gptj", "llama", "mistral")
_MAX_FACTOR = 1e6
ANY_MODEL = "adaplex.any"
"""In our own normalized folders: it fitted a base already, whose layers without a bottleneck have none."""


@dataclass(frozen=True)
class BottleneckConfig:
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


def parse_bottleneck_config(source: Source) -> BottleneckConfig:
    """The config in the source's fields. Raises InvalidAdapter with everything that is wrong with it."""
    fields = source.fields
    inner = fields.get("config")
    if not isinstance(inner, dict):
        raise_if_any([f"{CONFIG_FILE} has no config object, in which the adapters library describes an adapter."])
    inner = cast(dict[str, Any], inner)
    problems = [*_outer_problems(fields), *field_problems(inner, _RULES), *_value_problems(inner, source)]
    hooked = fields.get("model_type") not in (*_NATIVE, ANY_MODEL)
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
    config = BottleneckConfig(
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
