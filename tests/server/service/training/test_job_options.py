"""What a client may ask of a trainer: nothing that it would refuse later, and nothing that runs code."""

from __future__ import annotations

from typing import Any

import pytest

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.service.training.job_options import check_options


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("metrics", "pty:spawn", "no metric"),
        ("compute_metrics", ["f1", "os:system"], "no metric"),
        ("targets", deep(900), "list of them"),
        ("gradient_checkpointing_kwargs", {"use_reentrant": deep(900)}, "list of them"),
        ("n_epochs", -1, "epochs must be between"),
        ("learning_rate", "fast", "must be a number"),
        ("output_dir", "/tmp", "no option"),
        ("", 1, "no option"),
    ],
)
def test_what_no_job_may_be_given(option: str, value: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        check_options({option: value})


def test_what_examples_write_is_taken() -> None:
    check_options(
        {"n_epochs": 3, "lora_r": 8, "targets": ["q_proj"], "metrics": ["f1"], "best_by": "f1", "bf16": True}
        | {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "learning_rate_multiplier": "0.5", "seed": 1}
    )
