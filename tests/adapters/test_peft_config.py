from __future__ import annotations

import json
from typing import Any

import pytest

from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.peft_config import LoraConfigFile, parse_config
from adaplex_adapters.strict_json import parse_object


def parse(text: str | bytes | None = None, **fields: Any) -> LoraConfigFile:
    if text is None:
        text = json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"], **fields})
    data = text.encode() if isinstance(text, str) else text
    return parse_config(parse_object(data, "adapter_config.json"), ReadLimits())


def test_defaults_are_pefts() -> None:
    from peft import LoraConfig

    found, theirs = parse(), LoraConfig()
    assert (found.rank, found.alpha, found.use_rslora) == (theirs.r, theirs.lora_alpha, theirs.use_rslora)
    assert found.rank_pattern == {} and found.targeting.layers is None and found.targeting.exclude == ()


def test_every_field_of_peft_is_known() -> None:
    """What PEFT writes by default is accepted; a new field that is set must be looked at."""
    from peft import LoraConfig

    written = json.loads(json.dumps(LoraConfig(target_modules=["q_proj"]).to_dict(), default=list))
    assert parse(**written).targeting.targets == ("q_proj",)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initializations_that_leave_the_base_alone(init: Any) -> None:
    assert parse(init_lora_weights=init).rank == 8


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"modules_to_save": ["lm_.*"]}, "modules_to_save"),
        ({"use_dora": 1}, "use_dora"),
        ({"adaplex_kind": "ia3"}, "adaplex_kind"),
        ({"lora_bias": True}, "bias"),
        ({"bias": 3}, "bias"),
        ({"trainable_token_indices": [1]}, "embedding"),
        ({"target_parameters": ["x"]}, "parameters"),
        ({"layer_replication": [[0, 2]]}, "layers"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"arrow_config": {"top_k": 1}}, "Arrow"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"monteclora_config": {"x": 1}}, "Monteclora"),
        ({"init_lora_weights": "pissa"}, "changed"),
        ({"init_lora_weights": "pissa_niter_16"}, "changed"),
        ({"init_lora_weights": "olora"}, "changed"),
        ({"init_lora_weights": "loftq"}, "changed"),
        ({"init_lora_weights": 3}, "init_lora_weights"),
        ({"a_future_field": {"x": 1}}, "does not know"),
        ({"r": 0}, "rank"),
        ({"r": -1}, "rank"),
        ({"r": 8.0}, "rank"),
        ({"r": True}, "rank"),
        ({"r": "8"}, "rank"),
        ({"r": None}, "rank"),
        ({"r": 257}, "256"),
        ({"r": 100_000}, "256"),
        ({"r": 10**300}, "bits"),
        ({"lora_alpha": None}, "alpha"),
        ({"lora_alpha": "16"}, "alpha"),
        ({"lora_alpha": 1e13}, "alpha"),
        ({"lora_alpha": 10**400}, "alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 1000}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": {"a": 1}}, "target_modules"),
        ({"exclude_modules": 5}, "exclude_modules"),
        ({"layers_to_transform": "0"}, "layers_to_transform"),
        ({"layers_to_transform": [0.5]}, "layers_to_transform"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "a\x1b[31m"}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "x" * 10_000}, "base_model_name_or_path"),
    ],
)
def test_refuses(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidAdapter, match=reason) as caught:
        parse(**fields)
    assert len(caught.value.message) < 1000 and caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "JSON"),
        ("[]", "object"),
        ("{", "JSON"),
        ('{"peft_type": "LORA", "lora_alpha": NaN, "target_modules": ["a"]}', "NaN"),
        ('{"peft_type": "LORA", "lora_alpha": -Infinity, "target_modules": ["a"]}', "Infinity"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999, "target_modules": ["a"]}', "alpha"),
        ('{"peft_type": "LORA", "r": 8, "r": 16}', "twice"),
        (b"\xff\xfe{}", "UTF-8"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested"),
        ('{"a": ' + "[" * 200_000, "nested|JSON"),
        ('{"peft_type": "\\ud800"}', "half of a character"),
        ('{"r": ' + "9" * 5000 + "}", "JSON"),
    ],
)
def test_refuses_texts(text: str | bytes, reason: str) -> None:
    with pytest.raises(InvalidAdapter, match=reason):
        parse(text)


def test_reports_everything_at_once() -> None:
    with pytest.raises(InvalidAdapter) as caught:
        parse(use_qalora=True, bias="some", r=0)
    assert all(word in caught.value.message for word in ("QA-LoRA", "bias", "rank"))
