"""A model's rotary settings, read from its config.json.

Both ways of writing them are read: `rope_theta` and `rope_scaling`, and transformers 5's `rope_parameters`, which may
differ between layers with full attention and with a sliding window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from adaplex_adapters.errors import StartupError
from adaplex_server.model.config_fields import ConfigFields

RopeKind = Literal["none", "default", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions. dim: leading dimensions of a head that rotate (even; the rest pass).

    kind "none": the family is not rotary, and nothing turns. "linear" divides every frequency by factor; "llama3"
    (Llama 3.1's scaling) divides the low ones and blends between, using low_freq_factor, high_freq_factor and
    original_context (tokens); "yarn" the same by the turns within original_context, beta_fast and beta_slow of them;
    "longrope" divides frequency i by short_factors[i], or long_factors[i] where contexts may be longer than
    original_context. attention_factor multiplies cos and sin.
    """

    kind: RopeKind
    theta: float
    dim: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


NO_ROPE = RopeConfig("none", 1.0, 2)


def parse_ropes(fields: ConfigFields, head_dim: int) -> tuple[RopeConfig, RopeConfig | None]:
    """Of the layers with full attention, and of those with a window where they have their own."""
    family = fields.family
    if family.positions is not None or fields.switch(family.alibi):
        return NO_ROPE, None
    given = dict(fields.raw.get("rope_scaling") or fields.raw.get("rope_parameters") or {})
    if isinstance(given.get("full_attention"), Mapping):
        local_theta = fields.value("rope_local_base_freq", fields.value("rope_theta"))
        local = dict(given.get("sliding_attention") or {})
        return _rope(fields, given["full_attention"], head_dim), _rope(
            fields, {"rope_theta": local_theta} | local, head_dim
        )
    whole = _rope(fields, given, head_dim)
    local_theta = fields.value("rope_local_base_freq")
    return whole, None if local_theta is None else RopeConfig("default", float(local_theta), whole.dim)


def _rope(fields: ConfigFields, given: Mapping[str, Any], head_dim: int) -> RopeConfig:
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "su" or (kind == "yarn" and fields.family.name == "phi3"):
        kind = "longrope"  # what Phi-3's first releases called it
    try:
        part = float(given.get("partial_rotary_factor", fields.value("partial_rotary_factor", 1.0)))
        theta = float(given.get("rope_theta", fields.value("rope_theta")))
        dim = 2 * ((int(head_dim * part) + 1) // 2)
        if kind in ("default", "dynamic"):
            # "dynamic" changes the frequencies only beyond max_position_embeddings, where nothing is served.
            return RopeConfig("default", theta, dim)
        maker = _SCALED.get(kind)
        if maker is not None:
            return maker(fields, given, theta, dim)
    except (KeyError, TypeError, ValueError) as error:
        raise StartupError(f"config.json: rotary settings of kind {kind!r} lack or misstate {error}") from error
    known = ", ".join(sorted(("default", "dynamic", *_SCALED)))
    raise StartupError(f"config.json: rotary scaling {kind!r} is not supported; use one of {known}")


def _linear(fields: ConfigFields, given: Mapping[str, Any], theta: float, dim: int) -> RopeConfig:
    return RopeConfig("linear", theta, dim, factor=float(given["factor"]))


def _llama3(fields: ConfigFields, given: Mapping[str, Any], theta: float, dim: int) -> RopeConfig:
    return RopeConfig(
        "llama3",
        theta,
        dim,
        factor=float(given["factor"]),
        low_freq_factor=float(given["low_freq_factor"]),
        high_freq_factor=float(given["high_freq_factor"]),
        original_context=_original_context(fields, given),
    )


def _yarn(fields: ConfigFields, given: Mapping[str, Any], theta: float, dim: int) -> RopeConfig:
    """The attention factor as YaRN (Peng et al. 2023) recommends unless it is given."""
    original, factor = _original_context(fields, given), _factor(fields, given)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = given.get("attention_factor")
    if attention is None:
        above, below = given.get("mscale"), given.get("mscale_all_dim")
        attention = magnitude(above) / magnitude(below) if above and below else magnitude(1.0)
    return RopeConfig(
        "yarn",
        theta,
        dim,
        factor=factor,
        original_context=original,
        attention_factor=float(attention),
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        truncate=bool(given.get("truncate", True)),
    )


def _longrope(fields: ConfigFields, given: Mapping[str, Any], theta: float, dim: int) -> RopeConfig:
    """The attention factor as LongRoPE (Ding et al. 2024) has it unless it is given."""
    original, factor = _original_context(fields, given), _factor(fields, given)
    attention = given.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = {key: tuple(float(value) for value in given[key]) for key in ("short_factor", "long_factor")}
    for key, values in factors.items():
        if len(values) != dim // 2:
            raise StartupError(f"config.json: {key} has {len(values)} values, and {dim} dimensions of a head rotate")
    return RopeConfig(
        "longrope",
        theta,
        dim,
        factor=factor,
        original_context=original,
        attention_factor=float(attention),
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
    )


_SCALED: Mapping[str, Callable[[ConfigFields, Mapping[str, Any], float, int], RopeConfig]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _original_context(fields: ConfigFields, given: Mapping[str, Any]) -> int:
    own = fields.value("original_max_position_embeddings")
    return int(own or given.get("original_max_position_embeddings") or fields.count("max_position_embeddings"))


def _factor(fields: ConfigFields, given: Mapping[str, Any]) -> float:
    """Left out, it is how much longer contexts have become."""
    own = given.get("factor")
    return float(own) if own is not None else fields.count("max_position_embeddings") / _original_context(fields, given)
