"""The same run by TRL's SFTTrainer with PEFT: same base, rows, first weights and options give the same loss curve.

Tolerance: losses agree to 1 in 100,000 at every step (measured: 2 in 10 million). Both compute in float32; what differs
is the order of sums.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex_adapters.training.conversations import read_examples
from adaplex_adapters.training.frozen_base import FrozenBase, load_frozen_base
from adaplex_adapters.training.methods.attach import attach_adapter
from adaplex_adapters.training.option_names import options_from
from adaplex_adapters.training.trainer import train_adapter
from support.quiet_progress import Quiet

STEPS = 12
COMMON: dict[str, Any] = {
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "max_steps": STEPS,
    "gradient_accumulation_steps": 2,
    "seed": 3,
}
ADAPTER: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
METHODS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("parity") / "rows.jsonl"
    rows = [{"prompt": f"{i} and {i} is", "completion": f" {2 * i}"} for i in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def first_weights(base: FrozenBase, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    adapter = attach_adapter(base, options_from(given))
    found = {name: p.detach().clone() for name, p in adapter.trained().items()}
    adapter.detach()
    return found


def ours(folder: Path, data: Path, out: Path, given: dict[str, Any]) -> list[float]:
    """Batches of half the rows, two a step: every step sees all rows, so the order does not matter."""
    plain = {"batch_size": 8, "held_out": 0.0, "warmup": 0, "quantize": "none", "precision": "fp32"}
    options = options_from({**COMMON, **ADAPTER, **given, **plain})
    quiet = Quiet()
    train_adapter(read_examples(data), load_frozen_base(folder, "tiny", "cpu", options), out, options, quiet)
    return [quiet.losses[step] for step in range(1, STEPS + 1)]


def theirs(folder: Path, data: Path, out: Path, given: dict[str, Any]) -> list[float]:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from peft import LoraConfig, get_peft_model

    options = options_from({**ADAPTER, **given, "seed": 3, "quantize": "none", "precision": "fp32"})
    base = load_frozen_base(folder, "tiny", "cpu", options)
    begun = first_weights(base, {**ADAPTER, **given, "seed": 3})
    model = get_peft_model(base.model, LoraConfig(task_type="CAUSAL_LM", **ADAPTER, **given))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(begun[name])
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in encoded(base, data)]
    settings = trl.SFTConfig(
        output_dir=str(out), per_device_train_batch_size=8, logging_steps=1, report_to="none", save_strategy="no",
        use_cpu=True, bf16=False, warmup_steps=0, packing=False, max_length=None, disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False, optim="adamw_torch", **COMMON,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=base.tokenizer,
        data_collator=collate,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def encoded(base: FrozenBase, data: Path) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion as TRL's documents have it, written here once more: the prompt is not learned."""
    found = []
    for line in data.read_text().splitlines():
        row = json.loads(line)
        prompt = base.tokenizer(row["prompt"])["input_ids"]
        answer = [
            *base.tokenizer(row["completion"], add_special_tokens=False)["input_ids"],
            base.tokenizer.eos_token_id,
        ]
        found.append((prompt + answer, [-100] * len(prompt) + answer))
    return found


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    ids, labels = padded("input_ids", 2), padded("labels", -100)
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_curve_is_that_of_trl_and_peft(name: str, base_folder: Path, data: Path, tmp_path: Path) -> None:
    given = METHODS[name]
    wanted = theirs(base_folder, data, tmp_path / "theirs", given)
    found = ours(base_folder, data, tmp_path / "ours", given)
    assert len(found) == len(wanted) == STEPS
    assert found[-1] < 0.9 * found[0]
    assert found == pytest.approx(wanted, rel=1e-5)
