"""The model families that the one decoder serves, as rows of data, and what follows from a row and a config.

A family says where a checkpoint keeps each thing and how a layer is put together; nothing here runs. Another family
is another row, and a new field only where the decoder learns something new. Module names are those of transformers,
which PEFT's adapters use too.

Notation: a `linear` is one of the decoder's hot-path linears ("qkv", "o", "gate_up" or "up", "down"), perhaps several
modules of the checkpoint fused along out-features; a `norm` is "attention" or "mlp" (before that block), "q" or "k"
(over each head).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from adaplex_adapters.base_shape import BaseShape, LinearShape

if TYPE_CHECKING:
    from adaplex_server.model.config import ModelConfig

QkvLayout = Literal["blocks", "heads"]


def _frozen(base: Mapping[str, Any] = MappingProxyType({}), **items: Any) -> Mapping[str, Any]:
    """`base` with `items` added or replaced, read-only."""
    return MappingProxyType({**base, **items})


@dataclass(frozen=True)
class Family:
    """One row.

    model_type: as config.json states it. norm: "rms" (weight only) or "layer" (weight and bias, mean removed).
    gated: down(act(gate) * up) instead of down(act(up)).
    qkv_layout: "blocks" has all q heads, then all k heads, then all v heads in the outputs of "qkv"; "heads" has (q,
    k, v) of head 0, then of head 1, ...
    embedding, head, final_norm, layer: module paths; `layer` is formatted with the number and prefixes what follows.
    linears: linear -> module paths in the layer, in fused order. norms: norm -> module path in the layer.
    biases: linear -> True, or the config key that turns its bias on, or absent for none.
    keys: our name -> config.json's, where they differ. defaults: values of config.json's keys that may be left out
    (transformers' own defaults).
    """

    model_type: str
    norm: Literal["rms", "layer"]
    gated: bool
    qkv_layout: QkvLayout
    embedding: str
    head: str
    final_norm: str
    layer: str
    linears: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, str]
    biases: Mapping[str, bool | str] = field(default_factory=_frozen)
    keys: Mapping[str, str] = field(default_factory=_frozen)
    defaults: Mapping[str, Any] = field(default_factory=_frozen)


_LLAMA_LINEARS = _frozen(
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    o=("self_attn.o_proj",),
    gate_up=("mlp.gate_proj", "mlp.up_proj"),
    down=("mlp.down_proj",),
)
_LLAMA_NORMS = _frozen(attention="input_layernorm", mlp="post_attention_layernorm")
_LLAMA_DEFAULTS: Mapping[str, Any] = _frozen(
    hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10_000.0, tie_word_embeddings=False, max_position_embeddings=2048
)


def _llama_like(model_type: str, **changes: Any) -> Family:
    """A row that has Llama's module names."""
    row: dict[str, Any] = {
        "model_type": model_type,
        "norm": "rms",
        "gated": True,
        "qkv_layout": "blocks",
        "embedding": "model.embed_tokens",
        "head": "lm_head",
        "final_norm": "model.norm",
        "layer": "model.layers.{}",
        "linears": _LLAMA_LINEARS,
        "norms": _LLAMA_NORMS,
        "defaults": _LLAMA_DEFAULTS,
    }
    return Family(**(row | changes))


_QWEN_DEFAULTS = _frozen(
    _LLAMA_DEFAULTS,
    max_position_embeddings=32768,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
)

_ROWS = (
    _llama_like("llama", biases=_frozen(qkv="attention_bias", o="attention_bias", gate_up="mlp_bias", down="mlp_bias")),
    _llama_like(
        "mistral",
        defaults=_frozen(_LLAMA_DEFAULTS, max_position_embeddings=131072, sliding_window=4096, num_key_value_heads=8),
    ),
    _llama_like("qwen2", biases=_frozen(qkv=True), defaults=_QWEN_DEFAULTS),
    _llama_like(
        "qwen3",
        norms=_frozen(_LLAMA_NORMS, q="self_attn.q_norm", k="self_attn.k_norm"),
        biases=_frozen(qkv="attention_bias", o="attention_bias"),
        defaults=_frozen(_QWEN_DEFAULTS, head_dim=128),
    ),
    Family(
        model_type="gpt_neox",
        norm="layer",
        gated=False,
        qkv_layout="heads",
        embedding="gpt_neox.embed_in",
        head="embed_out",
        final_norm="gpt_neox.final_layer_norm",
        layer="gpt_neox.layers.{}",
        linears=_frozen(
            qkv=("attention.query_key_value",),
            o=("attention.dense",),
            up=("mlp.dense_h_to_4h",),
            down=("mlp.dense_4h_to_h",),
        ),
        norms=_LLAMA_NORMS,
        biases=_frozen(qkv="attention_bias", o="attention_bias", up=True, down=True),
        keys=_frozen(norm_eps="layer_norm_eps", rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct"),
        defaults=_frozen(
            hidden_act="gelu",
            layer_norm_eps=1e-5,
            rotary_emb_base=10_000.0,
            rotary_pct=0.25,
            tie_word_embeddings=False,
            use_parallel_residual=True,
            attention_bias=True,
            max_position_embeddings=2048,
        ),
    ),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({row.model_type: row for row in _ROWS})


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
    if linear == "qkv":
        fused = FAMILIES[config.family].linears[linear]
        return ((q_width, kv_width, kv_width) if len(fused) == 3 else (q_width + 2 * kv_width,)), hidden
    widths = {
        "o": ((hidden,), q_width),
        "gate_up": ((inner, inner), hidden),
        "up": ((inner,), hidden),
        "down": ((hidden,), inner),
    }
    return widths[linear]


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
    """Module path in the checkpoint of a layer's norm ("attention", "mlp", "q", "k")."""
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
    )
