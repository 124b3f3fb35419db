"""Which modules a config targets, with which rank and alpha: the same as PEFT's own functions say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaplex_adapters.automaton import WorkBudget
from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.patterns import TargetRule, by_pattern
from adaplex_adapters.peft_config import parse_config

PATHS = [
    f"{stem}.{layer}.{name}"
    for stem in ("model.layers", "transformer.h", "h")
    for layer in (0, 1, 11)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "experts.0.up_proj")
] + ["lm_head", "q_proj", "model.embed_out"]

CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["self_attn.q_proj"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "h.1.mlp.down_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r"model\.layers\.(?!0)\d+\..*"},
    {"target_modules": "q_proj"},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj", "lm_head"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*\.11\..*"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["experts", "h"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
]


def parsed(**fields: Any) -> Any:
    return parse_config({"peft_type": "LORA", **json.loads(json.dumps(fields))}, ReadLimits()).targeting


@pytest.mark.parametrize("fields", CONFIGS, ids=range(len(CONFIGS)))
def test_targets_as_peft_does(fields: dict[str, Any]) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    theirs = LoraConfig(**fields)
    expected = []
    for path in PATHS:
        found = check_target_module_exists(theirs, path)
        if found and not isinstance(found, _ExcludedModule):
            expected.append(path)
    assert list(TargetRule(parsed(**fields), WorkBudget()).targets(PATHS)) == expected


def test_all_linear_targets_all() -> None:
    assert TargetRule(parsed(target_modules="All-Linear"), WorkBudget()).targets(PATHS) == tuple(PATHS)


keys = st.one_of(
    st.sampled_from(PATHS),
    st.sampled_from(
        [
            "q_proj",
            "proj",
            "self_attn.q_proj",
            r"layers\.1\..*",
            "1.self_attn.v_proj",
            r".*down_proj",
            "^h",
            r"(q|v)_proj",
            r"^model.*",
            r"[^.]+_proj",
            "",
            "layers.1",
            r"\d+\.mlp\.down_proj",
            r"(?<=\.)q_proj",
            "a|b",
        ]
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(keys, st.integers(1, 64), max_size=5))
def test_patterns_as_peft_does(patterns: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    found = by_pattern(patterns, 99, "rank_pattern", WorkBudget(), PATHS)
    assert found == {path: patterns.get(get_pattern_key(list(patterns), path), 99) for path in PATHS}


@pytest.mark.parametrize("pattern", ["(", "a)|(b", "a)(", r"(a)\1", "a" * 5000])
def test_refuses_expressions(pattern: str) -> None:
    with pytest.raises(InvalidAdapter, match="is refused"):
        by_pattern({pattern: 1}, 1, "rank_pattern", WorkBudget(), PATHS)
    with pytest.raises(InvalidAdapter, match="target_modules is refused"):
        TargetRule(parsed(target_modules=pattern), WorkBudget())


def test_refuses_too_many_patterns() -> None:
    with pytest.raises(InvalidAdapter, match="at most"):
        by_pattern({f"m{n}": 1 for n in range(3000)}, 1, "alpha_pattern", WorkBudget(), PATHS)


def test_refuses_layer_expressions() -> None:
    with pytest.raises(InvalidAdapter, match="layers_pattern"):
        TargetRule(parsed(target_modules=["a"], layers_to_transform=[0], layers_pattern=".*"), WorkBudget())


def test_names_that_reach_nothing() -> None:
    rule = TargetRule(parsed(target_modules=["q_proj", "nothing", "h.0.self_attn.q_proj"]), WorkBudget())
    assert rule.names_without(rule.targets(PATHS)) == ("nothing",)
