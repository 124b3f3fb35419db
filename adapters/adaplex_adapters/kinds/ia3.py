"""IA3 (Liu et al. 2022) as PEFT saves it: one factor a feature, on the input of feedforward modules and else on the
output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adaplex_adapters.automaton import WorkBudget
from adaplex_adapters.fit import ModuleFit
from adaplex_adapters.kinds.lora import saved_weights
from adaplex_adapters.kinds.reading import Reading, Source
from adaplex_adapters.patterns import expression
from adaplex_adapters.peft_fields import CONFIG_FILE, FieldRules, base_model_problem, field_problems, flag_problem
from adaplex_adapters.problems import Gathered, raise_if_any, shown
from adaplex_adapters.spec import KIND_IA3, Adapter, Scale, draft
from adaplex_adapters.targeting import TARGET_FIELDS, Targeting, target_problems, targeting
from adaplex_adapters.tensor_keys import by_module

_RULES = FieldRules(
    read=TARGET_FIELDS | {"feedforward_modules"},
    harmless=frozenset({"fan_in_fan_out", "init_ia3_weights"}),
    refused={
        "layers_to_transform": "IA3 has no such field, and PEFT would ignore it",
        "layers_pattern": "IA3 has no such field, and PEFT would ignore it",
    },
)
_ENDINGS = {"ia3_l": r"ia3_l(?:\.default)?", "weight": r"(?:modules_to_save\.default\.)?weight"}


@dataclass(frozen=True)
class _Config:
    targeting: Targeting
    feedforward: tuple[str, ...] | str
    base_model: str

    def on_input(self, paths: Mapping[str, object], budget: WorkBudget) -> set[str]:
        """The paths whose factors are on the input. PEFT lets a name match any end of a path, also within a word."""
        if isinstance(self.feedforward, str):
            matches = expression(self.feedforward, "feedforward_modules", budget)
            return {path for path in paths if matches(path)}
        return {path for path in paths if path.endswith(self.feedforward)}


def read_ia3(source: Source) -> Reading:
    """An IA3 adapter."""
    gathered = Gathered()
    config = gathered.step(_parse, source.fields)
    parts = gathered.step(by_module, source.tensors, _ENDINGS)
    gathered.raise_if_any()
    assert config is not None and parts is not None
    vectors = {path: part["ia3_l"] for path, part in parts.items() if "ia3_l" in part}
    problems = [f"Module {path} is adapted and replaced at once." for path in vectors if "weight" in parts[path]]
    weights = {path: part for path, part in parts.items() if path not in vectors}
    replaced, copies = saved_weights(config.targeting.saved, weights, problems)
    on_input = config.on_input(vectors, source.budget)
    problems += [p for path, tensor in vectors.items() for p in _shape_problems(path, tensor, path in on_input)]
    if not vectors and not problems:
        problems.append("The adapter holds no IA3 tensors.")
    raise_if_any(problems)
    scales = {
        path: Scale(tensor.reshape(-1), "input" if path in on_input else "output") for path, tensor in vectors.items()
    }
    adapter = Adapter(draft(KIND_IA3, config.base_model), scales=scales, replaced=replaced, base_copies=copies)
    return Reading(adapter, ModuleFit(config.targeting, source.budget))


def _parse(fields: Mapping[str, Any]) -> _Config:
    raise_if_any(
        [
            *field_problems(fields, _RULES),
            *flag_problem(fields, "fan_in_fan_out"),
            *target_problems(fields),
            *_feedforward_problem(fields),
            *base_model_problem(fields),
        ]
    )
    named = fields.get("feedforward_modules")
    return _Config(
        targeting(fields),
        named if isinstance(named, str) else tuple(named or ()),
        fields.get("base_model_name_or_path") or "",
    )


def _feedforward_problem(fields: Mapping[str, Any]) -> Iterator[str]:
    named = fields.get("feedforward_modules")
    if isinstance(named, str):
        return
    if not isinstance(named, list) or not all(isinstance(name, str) and name for name in named):
        yield (
            f"{CONFIG_FILE} has feedforward_modules={shown(named)}; it must be a list of module names or an expression "
            "(PEFT writes it when it saves an adapter)."
        )


def _shape_problems(path: str, tensor: torch.Tensor, on_input: bool) -> Iterator[str]:
    shape = list(tensor.shape)
    if len(shape) != 2 or 0 in shape or shape[0 if on_input else 1] != 1:
        wanted, side = ("[1, in]", "is") if on_input else ("[out, 1]", "is not")
        yield f"The ia3_l of {path} has shape {shape}; it must be {wanted}, since it {side} in feedforward_modules."
