from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.option_names import known_names, options_from, plain_options
from adaplex_adapters.training.options import TrainOptions


def test_names_of_trl_transformers_and_peft_mean_what_they_mean_there() -> None:
    given: dict[str, Any] = {
        "learning_rate": 1e-5,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "num_train_epochs": 3,
        "r": 32,
        "lora_alpha": 64,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "use_dora": True,
        "warmup_ratio": 0.1,
        "max_seq_length": 2048,
        "lr_scheduler_type": "linear",
        "optim": "paged_adamw_8bit",
        "max_grad_norm": 0.3,
        "bf16": True,
        "report_to": ["tensorboard"],
        "load_in_8bit": True,
        "task_type": "CAUSAL_LM",
        "early_stopping_patience": 3,
        "metric_for_best_model": "eval_loss",
        "bias": "none",
    }
    assert options_from(given) == TrainOptions(
        learning_rate=1e-5, batch_size=1, accumulation=8, epochs=3.0, rank=32, alpha=64.0, dropout=0.05,
        targets=("q_proj", "v_proj"), dora=True, warmup=0.1, max_length=2048, schedule="linear",
        optimizer="paged_adamw_8bit", clip=0.3, precision="bf16", tensorboard=True, quantize="int8", early_stopping=3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"method": "dora"}, {"dora": True}),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}, {"method": "prompt_tuning", "virtual_tokens": 8}),
        ({"method": "p-tuning"}, {"method": "p_tuning"}),
        ({"method": "adapter"}, {"method": "bottleneck"}),
        ({"init_lora_weights": True}, {}),
        ({"init_lora_weights": "pissa_niter_16"}, {"init": "pissa"}),
        ({"optim": "PagedAdam32bit"}, {"optimizer": "paged_adam"}),
        ({"bnb_4bit_compute_dtype": "torch.bfloat16"}, {"precision": "bf16"}),
        ({"batch_size": "auto", "n_epochs": "auto", "learning_rate_multiplier": "auto"}, {}),
        ({"warmup_steps": 2}, {"warmup": 2.0}),
        ({"bf16": True, "bnb_4bit_compute_dtype": "bfloat16"}, {"precision": "bf16"}),
        ({"rank": "16", "metrics": "f1, rouge_l"}, {"rank": 16, "metrics": ("f1", "rouge_l")}),
    ],
)
def test_ways_of_saying_it(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert options_from(given) == TrainOptions(**wanted)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lora_rnk": 4}, "did you mean 'lora_rank'"),
        ({"rank": 4.5}, "whole number"),
        ({"rank": True}, "whole number"),
        ({"rank": 4, "r": 8}, "already given"),
        ({"bias": "all"}, "bias can only be 'none'"),
        ({"task_type": "SEQ_CLS"}, "CAUSAL_LM"),
        ({"report_to": "wandb"}, "report_to"),
        ({"use_dora": "maybe"}, "true or false"),
        ({"learning_rate": "fast"}, "a number"),
        ({"learning_rate": float("nan")}, "between"),
        ({"target_modules": [1]}, "list of texts"),
        ({"method": "full"}, "must be one of lora"),
        ({"method": "ia3", "use_dora": True}, "belongs to method lora"),
        ({"method": "prefix", "gradient_checkpointing": True}, "needs the cache"),
        ({"metric_for_best_model": "f1"}, "neither loss"),
        ({"packing": True, "method": "prompt"}, "packing"),
    ],
)
def test_nothing_is_ignored_silently(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        options_from(given)
    assert caught.value.param


def test_options_survive_json() -> None:
    options = TrainOptions(rank=4, targets=("q_proj",), metrics=("f1",), dora=True, learning_rate=1e-4)
    assert options_from(json.loads(json.dumps(plain_options(options)))) == options
    assert plain_options(TrainOptions()) == {}


def test_every_option_says_what_it_is_and_no_name_means_two() -> None:
    fields = dataclasses.fields(TrainOptions)
    names = [name for field in fields for name in (field.name, *field.metadata["names"])]
    assert len(names) == len(set(names)) and set(names) <= known_names()
    assert all(field.metadata["help"].endswith(".") and field.metadata["group"] for field in fields)
