"""AdaLoRA (Zhang et al. 2023) as PEFT saves it: a LoRA with a factor E for each rank row, and ranks that training has
cut, some of them to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from adaplex_adapters.kinds.factored import REFUSED, Parts, check_fields, reading, rounded
from adaplex_adapters.kinds.reading import Reading, Source
from adaplex_adapters.peft_config import alpha_problem, rank_problem
from adaplex_adapters.peft_fields import CONFIG_FILE, FieldRules
from adaplex_adapters.problems import Gathered, raise_if_any, shown
from adaplex_adapters.spec import KIND_ADALORA, LoraModule
from adaplex_adapters.targeting import TARGET_FIELDS
from adaplex_adapters.tensor_keys import by_module, incomplete

_PARTS = ("lora_A", "lora_B", "lora_E")
# PEFT's AdaLoRA never looks at LoRA's rank, alpha_pattern and use_rslora.
_HARMLESS = frozenset(
    {
        "alpha_pattern",
        "beta1",
        "beta2",
        "corda_config",
        "deltaT",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "init_lora_weights",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "orth_reg_weight",
        "qalora_group_size",
        "r",
        "runtime_config",
        "target_r",
        "tfinal",
        "tinit",
        "total_step",
        "use_rslora",
        "velora_config",
    }
)
_RULES = FieldRules(
    read=TARGET_FIELDS | {"bias", "init_r", "lora_alpha", "rank_pattern"}, harmless=_HARMLESS, refused=REFUSED
)


def read_adalora(source: Source) -> Reading:
    """An AdaLoRA, as the LoRA that it is equal to."""
    fields = source.fields
    alpha, first_rank = fields.get("lora_alpha", 8), fields.get("init_r", 12)
    gathered = Gathered()
    own = [
        *alpha_problem("lora_alpha", alpha),
        *rank_problem("init_r", first_rank, source.limits),
        *_mask_problem(fields),
    ]
    gathered.step(check_fields, source, _RULES, own)
    parts = gathered.step(by_module, source.tensors, {part: rf"{part}(?:\.default)?" for part in _PARTS})
    gathered.raise_if_any()
    assert parts is not None
    raise_if_any(incomplete(parts, *_PARTS))
    masks = fields.get("rank_pattern") or {}
    ranks = {path: sum(masks[key]) if (key := f"{path}.lora_E") in masks else first_rank for path in parts}
    raise_if_any([p for path, part in parts.items() for p in _shape_problems(path, part, ranks[path])])
    modules = {path: _module(part, alpha, first_rank) for path, part in parts.items() if ranks[path] > 0}
    return reading(KIND_ADALORA, source, modules, frozenset(parts.keys() - modules.keys()))


def _module(part: Parts, alpha: float, first_rank: int) -> LoraModule:
    # PEFT divides by the rank that training began with plus this, also where it has cut the rank.
    scaling = rounded((alpha if alpha > 0 else part["lora_E"].shape[0]) / (first_rank + 1e-5))
    return LoraModule(part["lora_A"] * part["lora_E"], part["lora_B"], scaling)


def _mask_problem(fields: Mapping[str, Any]) -> Iterator[str]:
    masks = fields.get("rank_pattern") or {}
    values = list(masks.values()) if isinstance(masks, dict) else [None]
    if not all(isinstance(mask, list) and all(isinstance(kept, bool) for kept in mask) for mask in values):
        yield f"{CONFIG_FILE} has rank_pattern={shown(masks)}; an AdaLoRA's is a list of true and false a module."


def _shape_problems(path: str, part: Parts, rank: int) -> Iterator[str]:
    shapes = {name: list(tensor.shape) for name, tensor in part.items()}
    fits = shapes["lora_E"] == [rank, 1] and all(len(shapes[name]) == 2 for name in _PARTS)
    if not fits or shapes["lora_A"][0] != rank or shapes["lora_B"][1] != rank:
        yield (
            f"Module {path} has lora_A {shapes['lora_A']}, lora_E {shapes['lora_E']}, lora_B {shapes['lora_B']}; by "
            f"{CONFIG_FILE} they must be [{rank}, in], [{rank}, 1], [out, {rank}]."
        )
