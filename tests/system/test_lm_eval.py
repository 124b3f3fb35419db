"""lm-eval's local-completions against a real server, with a task on a local file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from running_server import RunningServer

from adaplex_server.bases.embedded import embedded_folder

BASE = "smollm2-135m-instruct"
SPOKEN = {
    "forty two": ["42", "40", "24", "402"],
    "nineteen": ["19", "90", "9", "91"],
    "three hundred and five": ["305", "350", "35", "3005"],
    "seventy one": ["71", "17", "701", "70"],
    "eleven": ["11", "12", "1", "101"],
    "two thousand and six": ["2006", "206", "26", "2060"],
}
CHAT = "<|im_start|>user\nroom {}<|im_end|>\n<|im_start|>assistant\n"
TASKS = {
    "choose_digits": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "say_digits": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["<|im_end|>", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [
        {"question": CHAT.format(words), "choices": [f"room {one}" for one in digits]}
        for words, digits in SPOKEN.items()
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "target_delimiter": "",
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**common, **task}))  # JSON is YAML
    return tmp_path


@pytest.mark.slow
def test_scores_of_an_adapter_and_of_the_base(
    server: RunningServer, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapter = evaluate(server, "itn-en", tasks, tokenized=True)
    assert adapter == evaluate(server, "itn-en", tasks, tokenized=False), "token ids and strings are scored alike"
    base = evaluate(server, BASE, tasks, tokenized=True)
    assert adapter["choose_digits"] >= 0.6
    assert adapter["say_digits"] >= base["say_digits"] + 0.4


def evaluate(server: RunningServer, model: str, tasks: Path, *, tokenized: bool) -> dict[str, float]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    arguments: dict[str, Any] = {
        "base_url": f"{server.http}/v1/completions",
        "model": model,
        "tokenizer": str(embedded_folder()),
        "tokenizer_backend": "huggingface",
        "tokenized_requests": tokenized,
        "num_concurrent": 2,
        "max_retries": 1,
    }
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=8,
        log_samples=False,
        bootstrap_iters=0,
    )
    told = found["results"]
    return {
        "choose_digits": told["choose_digits"]["acc,none"],
        "say_digits": told["say_digits"]["exact_match,none"],
    }
