"""PEFT's adapter_config.json, read as what a stranger claims: every field is used, known to be harmless, or refused.

Only LoRA is read here. What would change the answers and is not served (DoRA, trained biases, replaced modules, ...) is
refused with its reason, so that an adapter is never served as something else than what was trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.problems import raise_if_any, refuse, shown
from adaplex_adapters.strict_json import parse_object

CONFIG_FILE = "adapter_config.json"
_MAX_ALPHA = 1e12
_MAX_BASE_NAME = 512


@dataclass(frozen=True)
class LoraConfigFile:
    """The fields that say what a LoRA does. Patterns keep their order: PEFT lets the first match win.

    targets: module names, or one regular expression (or "all-linear"). layers: None for all.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: tuple[str, ...] | str
    exclude: tuple[str, ...] | str
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    base_model: str


# What each field means when it is set, for the refusal. "Set" is anything but null, false, empty or zero.
_REFUSED: Mapping[str, str] = {
    "use_dora": "this is a DoRA adapter, a kind that this version does not serve yet",
    "modules_to_save": "it replaces whole modules of the shared base; train it without modules_to_save",
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
}
# Fields that cannot change an answer: how it was trained, initialized or made, and by what.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "unsloth_fixed",
        "velora_config",
    }
)

_READ = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)

# Initializations that change the base's own weights: PEFT repeats that change when it loads such an adapter. Serving
# it on the unchanged base would be wrong. PEFT converts such an adapter to a plain one when it is saved (see
# `_init_problem`).
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def parse_config(data: bytes, limits: ReadLimits) -> LoraConfigFile:
    """The config in `data` (JSON). Raises InvalidAdapter with everything that is wrong with it."""
    fields = parse_object(data, CONFIG_FILE)
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise refuse(f"{CONFIG_FILE} says peft_type {shown(kind)}; this version serves LORA only.")
    raise_if_any([*_refusals(fields), *_value_problems(fields, limits)])
    return _config(fields)


def _refusals(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        if name in _REFUSED and value:
            yield f"{CONFIG_FILE} sets {name}={shown(value)}: {_REFUSED[name]}."
        elif name not in _REFUSED and name not in _HARMLESS and name not in _READ and value:
            yield (
                f"{CONFIG_FILE} sets {shown(name)}={shown(value)}, which this version does not know, so it cannot tell "
                "whether the adapter would be served rightly; remove the field if it has no effect."
            )
    if fields.get("bias", "none") not in ("none", None):
        yield f"{CONFIG_FILE} says bias={shown(fields['bias'])}: trained biases are not served; use bias='none'."
    yield from _init_problem(fields.get("init_lora_weights", True))


def _init_problem(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.lower().startswith(_BASE_CHANGING):
        yield (
            f"{CONFIG_FILE} says init_lora_weights={shown(value)}: such an adapter belongs to a base whose weights "
            "were changed at the start of training, not to the base served here. Convert it: PEFT's "
            "save_pretrained with path_initial_model_for_weight_conversion."
        )
    elif not isinstance(value, bool | str | None):
        yield f"{CONFIG_FILE} has the impossible init_lora_weights {shown(value)}."


def _value_problems(fields: Mapping[str, Any], limits: ReadLimits) -> Iterator[str]:
    yield from _rank_problem("r", fields.get("r", 8), limits)
    yield from _alpha_problem("lora_alpha", fields.get("lora_alpha", 8))
    for name in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(fields.get(name, False), bool):
            yield f"{CONFIG_FILE} has {name}={shown(fields[name])}; it must be true or false."
    for name, check in (("rank_pattern", lambda n, v: _rank_problem(n, v, limits)), ("alpha_pattern", _alpha_problem)):
        patterns = fields.get(name) or {}
        if not isinstance(patterns, dict):
            yield f"{CONFIG_FILE} has {name}={shown(patterns)}; it must be an object."
        else:
            for key, value in patterns.items():
                yield from check(f"{name}[{shown(key)}]", value)
    yield from _target_problems(fields)
    layers = fields.get("layers_to_transform")
    layer_list = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(type(layer) is int for layer in layer_list):
        yield f"{CONFIG_FILE} has layers_to_transform={shown(layers)}; it must be a layer's number or a list of them."
    base = fields.get("base_model_name_or_path")
    if base is not None and not (isinstance(base, str) and len(base) <= _MAX_BASE_NAME and base.isprintable()):
        yield f"{CONFIG_FILE} has the impossible base_model_name_or_path {shown(base)}."


def _rank_problem(name: str, value: Any, limits: ReadLimits) -> Iterator[str]:
    if type(value) is not int or value < 1:
        yield f"{CONFIG_FILE} has {name}={shown(value)}; a rank is a whole number from 1."
    elif value > limits.max_rank:
        yield f"{CONFIG_FILE} has {name}={shown(value)}; ranks up to {limits.max_rank} are served."


def _alpha_problem(name: str, value: Any) -> Iterator[str]:
    if type(value) not in (int, float) or not abs(value) <= _MAX_ALPHA or not math.isfinite(value):
        yield f"{CONFIG_FILE} has {name}={shown(value)}; an alpha is a finite number of at most {_MAX_ALPHA:g}."


def _target_problems(fields: Mapping[str, Any]) -> Iterator[str]:
    targets = fields.get("target_modules")
    if not targets:
        yield (
            f"{CONFIG_FILE} has target_modules={shown(targets)}, so it does not say which modules it adapts; name them "
            "there (PEFT writes them when it saves an adapter)."
        )
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = fields.get(name)
        names = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, str) for item in names):
            yield f"{CONFIG_FILE} has {name}={shown(value)}; it must be text or a list of texts."
    if (
        isinstance(targets, str)
        and targets.lower() != "all-linear"
        and fields.get("layers_to_transform") not in (None, [])
    ):
        yield f"{CONFIG_FILE} has layers_to_transform beside an expression in target_modules: remove one."


def _config(fields: Mapping[str, Any]) -> LoraConfigFile:
    layers = fields.get("layers_to_transform")
    return LoraConfigFile(
        rank=fields.get("r", 8),
        alpha=float(fields.get("lora_alpha", 8)),
        use_rslora=fields.get("use_rslora", False),
        rank_pattern=dict(fields.get("rank_pattern") or {}),
        alpha_pattern={key: float(value) for key, value in (fields.get("alpha_pattern") or {}).items()},
        targets=_names(fields["target_modules"]),
        exclude=_names(fields.get("exclude_modules")),
        layers=None if layers is None or layers == [] else tuple(layers) if isinstance(layers, list) else (layers,),
        layers_pattern=tuple([p] if isinstance(p := fields.get("layers_pattern"), str) and p else p or []),
        base_model=fields.get("base_model_name_or_path") or "",
    )


def _names(value: Any) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else tuple(value or ())
