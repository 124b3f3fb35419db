"""The shape of a model, read from a folder in Hugging Face layout (config.json and generation_config.json) without
importing transformers. What the decoder would have to guess is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from adaplex_adapters.errors import StartupError
from adaplex_server.model.config_fields import ConfigFields
from adaplex_server.model.families import FAMILIES
from adaplex_server.model.family import Family
from adaplex_server.model.json_file import read_json_object
from adaplex_server.model.rope_config import RopeConfig, parse_ropes

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class ModelConfig:
    """One model's shape. family: a key of FAMILIES.

    max_context: positions the model was made for. windows: a layer's sliding window in tokens, the query's own
    included, or None for full attention. rope: rotary positions; local_rope: those of layers with a window where they
    differ.
    attention_scale: what scores are multiplied by. attention_softcap, logit_softcap: c where scores or logits s become
    c * tanh(s / c). embedding_scale: what embeddings are multiplied by. alibi_scale: what ALiBi's slopes are multiplied
    by, None without ALiBi.
    biased_linears: the hot-path linears that have a bias. dtype: of the checkpoint's tensors, as it states it
    ("float32", "bfloat16", "float16").
    eos_token_ids: of config.json and generation_config.json, sorted; none outside the vocabulary. quantization:
    config.json's quantization_config as it stands, or None.
    """

    name: str
    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    norm_eps: float
    activation: Activation
    parallel_residual: bool
    tied_head: bool
    rope: RopeConfig
    local_rope: RopeConfig | None
    windows: tuple[int | None, ...]
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    embedding_scale: float
    alibi_scale: float | None
    biased_linears: frozenset[str]
    eos_token_ids: tuple[int, ...]
    dtype: str
    quantization: Mapping[str, Any] | None


def read_config(folder: Path, name: str | None = None) -> ModelConfig:
    """The config of the model in `folder`; `name` defaults to the folder's.

    Raises StartupError if config.json is missing or not readable, the family is unknown, or a setting is one that the
    decoder does not have.
    """
    raw = read_json_object(folder / "config.json")
    if raw is None:
        raise StartupError(f"no config.json in {folder}: not a model folder in Hugging Face layout")
    generation = read_json_object(folder / "generation_config.json") or {}
    return parse_config(raw, generation, name or folder.resolve().name)


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any], name: str) -> ModelConfig:
    """`read_config` on what the two files hold."""
    family = _family(raw)
    fields = ConfigFields(raw, family)
    hidden = fields.count("hidden_size")
    heads = fields.count("num_attention_heads")
    head_dim = fields.count("head_dim", hidden // heads)
    kv_heads = _kv_heads(fields, heads)
    if heads % kv_heads:
        raise StartupError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads")
    layers = fields.count("num_hidden_layers")
    scale = fields.number("query_pre_attn_scalar", head_dim) ** -0.5
    alibi = fields.switch(family.alibi)
    rope, local_rope = parse_ropes(fields, head_dim)
    quantization = raw.get("quantization_config")
    return ModelConfig(
        name=name,
        family=family.name,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=fields.count("intermediate_size", None if family.inner is None else family.inner * hidden),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=fields.count("vocab_size"),
        max_context=fields.count("max_position_embeddings"),
        norm_eps=fields.number("norm_eps") if "norm_eps" in family.keys else fields.number("rms_norm_eps"),
        activation=_activation(fields),
        parallel_residual=fields.switch(family.parallel),
        tied_head=bool(fields.value("tie_word_embeddings")),
        rope=rope,
        local_rope=local_rope,
        windows=_windows(fields, layers),
        attention_scale=scale,
        attention_softcap=fields.number_if_there("attn_logit_softcapping"),
        logit_softcap=fields.number_if_there("final_logit_softcapping"),
        embedding_scale=hidden**0.5 if family.scaled_embedding else 1.0,
        alibi_scale=(scale if family.alibi_scaled else 1.0) if alibi else None,
        biased_linears=frozenset(linear for linear, switch in family.biases.items() if fields.switch(switch)),
        eos_token_ids=_token_ids(fields.count("vocab_size"), raw.get("eos_token_id"), generation.get("eos_token_id")),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        quantization=None if quantization is None else MappingProxyType(dict(quantization)),
    )


def _family(raw: Mapping[str, Any]) -> Family:
    """The row that a config.json is served by."""
    model_type = str(raw.get("model_type"))
    rows = [row for row in FAMILIES.values() if row.model_type == model_type]
    if not rows:
        known = ", ".join(sorted({row.model_type for row in FAMILIES.values()}))
        raise StartupError(f"unknown model family {raw.get('model_type')!r}; known families are: {known}")
    fitting = (row for row in rows if all(ConfigFields(raw, row).value(key) == row.when[key] for key in row.when))
    family = next(fitting, rows[-1])
    fields = ConfigFields(raw, family)
    for key, served in family.required.items():
        if fields.value(key, served) != served:
            raise StartupError(
                f"config.json: {key} {fields.value(key)!r} is not supported in {model_type}, {served} is"
            )
    projected = fields.value("word_embed_proj_dim")
    if projected not in (None, fields.value("hidden_size")):
        raise StartupError(
            f"config.json: embeddings projected from {projected} (word_embed_proj_dim) are not supported"
        )
    return family


def _kv_heads(fields: ConfigFields, heads: int) -> int:
    if fields.family.multi_query:
        return 1
    if fields.family.qkv_layout == "heads":
        return heads
    return fields.count("num_key_value_heads", heads)


def _windows(fields: ConfigFields, layers: int) -> tuple[int | None, ...]:
    """Null switches a window off, so it must not fall back to the default."""
    window = fields.raw.get("sliding_window", fields.family.defaults.get("sliding_window"))
    switch = fields.value("use_sliding_window")
    if window is None or switch is False:
        return (None,) * layers
    kinds = fields.raw.get("layer_types")
    if kinds is None and fields.family.window_every is not None:
        every = fields.count("sliding_window_pattern", fields.family.window_every)
        return tuple(int(window) if (layer + 1) % every else None for layer in range(layers))
    if kinds is None:
        # Qwen2 and Qwen3 keep the first layers whole; a family without the switch has the window everywhere.
        first = 0 if switch is None else int(fields.value("max_window_layers", 0))
        return tuple(int(window) if layer >= first else None for layer in range(layers))
    known = {"sliding_attention": int(window), "full_attention": None}
    if len(kinds) != layers or not set(kinds) <= set(known):
        raise StartupError(f"config.json: layer_types must name {layers} layers of {sorted(known)}, not {kinds!r}")
    return tuple(known[kind] for kind in kinds)


def _activation(fields: ConfigFields) -> Activation:
    name = fields.value("hidden_act")
    found = _ACTIVATIONS.get(str(name))
    if found is None:
        raise StartupError(f"config.json: hidden_act {name!r} is not supported; use one of {sorted(_ACTIVATIONS)}")
    return "gelu_tanh" if found == "gelu" and fields.family.gelu_is_tanh else found


def _token_ids(vocab_size: int, *values: int | list[int] | None) -> tuple[int, ...]:
    """Those that have a logit: a config may keep its class's default, which is no token of a smaller vocabulary."""
    ids: set[int] = set()
    for value in values:
        ids.update([value] if isinstance(value, int) else value or [])
    return tuple(sorted(token for token in ids if 0 <= token < vocab_size))
