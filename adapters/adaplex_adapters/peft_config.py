"""PEFT's adapter_config.json of a LoRA: every field is used, known to be harmless, or refused.

What would change the answers and is not served (activated LoRA, routing, changed bases, ...) is refused with its
reason, so that an adapter is never served as something else than what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.peft_fields import (
    CONFIG_FILE,
    FieldRules,
    base_model_problem,
    field_problems,
    flag_problem,
    number_problem,
)
from adaplex_adapters.problems import raise_if_any, shown
from adaplex_adapters.spec import CONVERTED_KINDS, KIND_DORA, KIND_LORA
from adaplex_adapters.targeting import TARGET_FIELDS, Targeting, target_problems, targeting

__all__ = ["CONFIG_FILE", "KIND_FIELD", "MAX_ALPHA", "LoraConfigFile", "alpha_problem", "parse_config", "rank_problem"]

MAX_ALPHA = 1e12
KIND_FIELD = "adaplex_kind"
"""In our own normalized folders: the kind that the low-rank modules were converted from."""


@dataclass(frozen=True)
class LoraConfigFile:
    """The fields that say what a LoRA does. Patterns keep their order: PEFT lets the first match win."""

    kind: str
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targeting: Targeting
    tied: bool
    base_model: str


_RULES = FieldRules(
    read=TARGET_FIELDS
    | {
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "init_lora_weights",
        "lora_alpha",
        "r",
        "rank_pattern",
        "use_dora",
        "use_rslora",
        KIND_FIELD,
    },
    harmless=frozenset(
        {
            "corda_config",
            "eva_config",
            "fan_in_fan_out",
            "loftq_config",
            "lora_dropout",
            "lora_ga_config",
            "megatron_core",
            "merge_weights",
            "qalora_group_size",
            "runtime_config",
            "unsloth_fixed",
            "velora_config",
        }
    ),
    refused={
        "lora_bias": "its B has a trained bias, which is not served; train it with lora_bias=False",
        "trainable_token_indices": "it replaces rows of the embedding, which the base shares; train it without them",
        "target_parameters": "it adapts bare parameters (mixture of experts), which are not served",
        "layer_replication": "it repeats layers of the base, which is shared",
        "alora_invocation_tokens": "it is an activated LoRA (aLoRA), a kind that is not served",
        "use_qalora": "it is a QA-LoRA, a kind that is not served",
        "use_bdlora": "it is a block-diagonal LoRA, a kind that is not served",
        "arrow_config": "it routes between adapters (Arrow), which is not served",
        "kasa_config": "it is a KaSA adapter, a kind that is not served",
        "monteclora_config": "it is a Monteclora adapter, a kind that is not served",
        "enable_lora": "it was made for fused layers by a very old PEFT; save it again with a newer one",
        "megatron_config": "it was trained on Megatron's layers, which differ from the base's",
    },
)

# Initializations that change the base's own weights: PEFT repeats that change when it loads such an adapter. Serving
# it on the unchanged base would be wrong. PEFT converts such an adapter to a plain one when it is saved (see
# `_refusals`).
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def parse_config(fields: Mapping[str, Any], limits: ReadLimits) -> LoraConfigFile:
    """The config in `fields`. Raises InvalidAdapter with everything that is wrong with it."""
    raise_if_any([*field_problems(fields, _RULES), *_refusals(fields), *_value_problems(fields, limits)])
    return LoraConfigFile(
        kind=KIND_DORA if fields.get("use_dora") else fields.get(KIND_FIELD) or KIND_LORA,
        rank=fields.get("r", 8),
        alpha=float(fields.get("lora_alpha", 8)),
        use_rslora=fields.get("use_rslora", False),
        rank_pattern=dict(fields.get("rank_pattern") or {}),
        alpha_pattern={key: float(value) for key, value in (fields.get("alpha_pattern") or {}).items()},
        targeting=targeting(fields),
        tied=bool(fields.get("ensure_weight_tying")),
        base_model=fields.get("base_model_name_or_path") or "",
    )


def _refusals(fields: Mapping[str, Any]) -> Iterator[str]:
    if fields.get("bias", "none") not in ("none", "all", "lora_only", None):
        yield f"{CONFIG_FILE} has the impossible bias={shown(fields['bias'])}; use bias='none'."
    if fields.get(KIND_FIELD) not in (None, *CONVERTED_KINDS) or (fields.get(KIND_FIELD) and fields.get("use_dora")):
        yield f"{CONFIG_FILE} has the impossible {KIND_FIELD}={shown(fields[KIND_FIELD])}."
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING):
        yield (
            f"{CONFIG_FILE} says init_lora_weights={shown(init)}: such an adapter belongs to a base whose weights "
            "were changed at the start of training, not to the base served here. Convert it: PEFT's "
            "save_pretrained with path_initial_model_for_weight_conversion."
        )
    elif not isinstance(init, bool | str | None):
        yield f"{CONFIG_FILE} has the impossible init_lora_weights {shown(init)}."


def _value_problems(fields: Mapping[str, Any], limits: ReadLimits) -> Iterator[str]:
    yield from rank_problem("r", fields.get("r", 8), limits)
    yield from alpha_problem("lora_alpha", fields.get("lora_alpha", 8))
    yield from flag_problem(fields, "use_rslora", "fan_in_fan_out", "use_dora", "ensure_weight_tying")
    for name, check in (("rank_pattern", lambda n, v: rank_problem(n, v, limits)), ("alpha_pattern", alpha_problem)):
        patterns = fields.get(name) or {}
        if not isinstance(patterns, dict):
            yield f"{CONFIG_FILE} has {name}={shown(patterns)}; it must be an object."
        else:
            for key, value in patterns.items():
                yield from check(f"{name}[{shown(key)}]", value)
    yield from target_problems(fields)
    yield from base_model_problem(fields)


def rank_problem(name: str, value: Any, limits: ReadLimits) -> Iterator[str]:
    """Unless value is a rank that is served."""
    if type(value) is not int or value < 1:
        yield f"{CONFIG_FILE} has {name}={shown(value)}; a rank is a whole number from 1."
    elif value > limits.max_rank:
        yield f"{CONFIG_FILE} has {name}={shown(value)}; ranks up to {limits.max_rank} are served."


def alpha_problem(name: str, value: Any) -> Iterator[str]:
    """Unless value is an alpha."""
    for problem in number_problem(name, value, MAX_ALPHA):
        yield problem.replace("it must be a finite", "an alpha is a finite")
