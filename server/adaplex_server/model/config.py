"""The shape of a model, read from a folder in Hugging Face layout (config.json and generation_config.json) without
importing transformers.

Both ways of writing the rotary settings are read: `rope_theta` and `rope_scaling`, and transformers 5's
`rope_parameters`. What the decoder would have to guess is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from adaplex_adapters.errors import StartupError
from adaplex_server.model.families import FAMILIES, Family
from adaplex_server.model.json_file import read_json_object

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
class RopeConfig:
    """Rotary positions. dim: leading dimensions of a head that rotate (even; the rest pass).

    kind "linear" divides every frequency by factor; "llama3" divides the low ones and blends between (Llama 3.1's
    scaling), using low_freq_factor, high_freq_factor and original_context (tokens); these three mean nothing for the
    other kinds.
    """

    kind: Literal["default", "linear", "llama3"]
    theta: float
    dim: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """One model's shape. family: a key of FAMILIES.

    max_context: positions the model was made for. windows: a layer's sliding window in tokens, the query's own
    included, or None for full attention.
    biased_linears: the hot-path linears that have a bias. dtype: of the checkpoint's tensors, as it states it
    ("float32", "bfloat16", "float16").
    eos_token_ids: of config.json and generation_config.json, sorted. quantization: config.json's quantization_config
    as it stands, or None.
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
    windows: tuple[int | None, ...]
    biased_linears: frozenset[str]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
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
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise StartupError(f"unknown model family {raw.get('model_type')!r}; known families are: {known}")
    fields = _Fields(raw, family)
    heads = fields.count("num_attention_heads")
    head_dim = fields.count("head_dim", fields.count("hidden_size") // heads)
    kv_heads = fields.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise StartupError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads")
    layers = fields.count("num_hidden_layers")
    quantization = raw.get("quantization_config")
    return ModelConfig(
        name=name,
        family=family.model_type,
        num_layers=layers,
        hidden_size=fields.count("hidden_size"),
        intermediate_size=fields.count("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=fields.count("vocab_size"),
        max_context=fields.count("max_position_embeddings"),
        norm_eps=fields.number(family.keys.get("norm_eps", "rms_norm_eps")),
        activation=_activation(fields.value("hidden_act")),
        parallel_residual=bool(fields.value("use_parallel_residual", False)),
        tied_head=bool(fields.value("tie_word_embeddings")),
        rope=_rope(fields, head_dim),
        windows=_windows(fields, layers),
        biased_linears=_biased_linears(fields),
        eos_token_ids=_token_ids(raw.get("eos_token_id"), generation.get("eos_token_id")),
        bos_token_id=raw.get("bos_token_id"),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        quantization=None if quantization is None else MappingProxyType(dict(quantization)),
    )


@dataclass(frozen=True)
class _Fields:
    """config.json with the family's defaults behind it. A null counts as left out, but for keys where null says
    something.
    """

    raw: Mapping[str, Any]
    family: Family

    def value(self, key: str, default: Any = None) -> Any:
        for source in (self.raw, self.family.defaults):
            if source.get(key) is not None:
                return source[key]
        return default

    def number(self, key: str, default: float | None = None) -> float:
        found = self.value(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or found <= 0:
            raise StartupError(f"config.json: {key} must be a positive number, not {found!r}")
        return float(found)

    def count(self, key: str, default: int | None = None) -> int:
        found = self.value(key, default)
        if isinstance(found, bool) or not isinstance(found, int) or found <= 0:
            raise StartupError(f"config.json: {key} must be a positive integer, not {found!r}")
        return found


def _rope(fields: _Fields, head_dim: int) -> RopeConfig:
    keys = fields.family.keys
    theta_key = keys.get("rope_theta", "rope_theta")
    part_key = keys.get("partial_rotary_factor", "partial_rotary_factor")
    given = dict(fields.raw.get("rope_scaling") or fields.raw.get("rope_parameters") or {})
    theta = given.get("rope_theta", fields.value(theta_key))
    part = given.get("partial_rotary_factor", fields.value(part_key, 1.0))
    dim = 2 * ((int(head_dim * part) + 1) // 2)
    kind = given.get("rope_type", given.get("type", "default"))
    try:
        if kind == "default":
            return RopeConfig("default", float(theta), dim)
        if kind == "linear":
            return RopeConfig("linear", float(theta), dim, factor=float(given["factor"]))
        if kind == "llama3":
            return RopeConfig(
                "llama3",
                float(theta),
                dim,
                factor=float(given["factor"]),
                low_freq_factor=float(given["low_freq_factor"]),
                high_freq_factor=float(given["high_freq_factor"]),
                original_context=int(
                    given.get("original_max_position_embeddings", fields.count("max_position_embeddings"))
                ),
            )
    except (KeyError, TypeError, ValueError) as error:
        raise StartupError(f"config.json: rotary settings of kind {kind!r} lack or misstate {error}") from error
    raise StartupError(f"config.json: rotary scaling {kind!r} is not supported; use default, linear or llama3")


def _windows(fields: _Fields, layers: int) -> tuple[int | None, ...]:
    """Null switches a window off, so it must not fall back to the default."""
    window = fields.raw.get("sliding_window", fields.family.defaults.get("sliding_window"))
    switch = fields.value("use_sliding_window")
    if window is None or switch is False:
        return (None,) * layers
    kinds = fields.raw.get("layer_types")
    if kinds is None:
        # Qwen2 and Qwen3 keep the first layers whole; a family without the switch has the window everywhere.
        first = 0 if switch is None else int(fields.value("max_window_layers", 0))
        return tuple(int(window) if layer >= first else None for layer in range(layers))
    known = {"sliding_attention": int(window), "full_attention": None}
    if len(kinds) != layers or not set(kinds) <= set(known):
        raise StartupError(f"config.json: layer_types must name {layers} layers of {sorted(known)}, not {kinds!r}")
    return tuple(known[kind] for kind in kinds)


def _biased_linears(fields: _Fields) -> frozenset[str]:
    switches = fields.family.biases
    return frozenset(
        linear
        for linear, switch in switches.items()
        if switch is True or (isinstance(switch, str) and fields.value(switch, False))
    )


def _activation(name: object) -> Activation:
    found = _ACTIVATIONS.get(str(name))
    if found is None:
        raise StartupError(f"config.json: hidden_act {name!r} is not supported; use one of {sorted(_ACTIVATIONS)}")
    return found


def _token_ids(*values: int | list[int] | None) -> tuple[int, ...]:
    ids: set[int] = set()
    for value in values:
        ids.update([value] if isinstance(value, int) else value or [])
    return tuple(sorted(ids))
