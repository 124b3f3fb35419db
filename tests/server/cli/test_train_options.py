from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.options import TrainOptions
from adaplex_server.cli.train import train_command
from adaplex_server.cli.train_options import TrainCommand, chosen_options, own_spelling, with_train_options

FLAGS = {"--rank", "--learning-rate", "--dora", "--name"}


def run(*arguments: str) -> TrainOptions:
    """The options that a command line ends up with."""
    found: list[TrainOptions] = []

    def body(data: str, *, options: TrainOptions) -> None:
        assert data == "rows.jsonl"
        found.append(options)

    application = typer.Typer()
    application.command(cls=TrainCommand)(with_train_options(body))
    result = CliRunner().invoke(application, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return found[0]


def test_every_option_of_the_trainer_has_a_flag_and_is_left_to_it_when_not_given() -> None:
    given = inspect.signature(train_command).parameters
    assert all(given[name].default is None for name in TrainOptions.__dataclass_fields__)
    assert run("rows.jsonl") == TrainOptions()


def test_the_options_of_the_documents_are_taken_under_their_usual_names() -> None:
    typed = (
        "--learning_rate 1e-5 --per_device_train_batch_size=1 --gradient_accumulation_steps 8 --num_train_epochs 3 "
        "--r 32 --lora_alpha 64 --lora_dropout 0.05 --target_modules q_proj,v_proj,k_proj,o_proj --bias none "
        "--task_type CAUSAL_LM --lr_scheduler_type cosine --max_seq_length 2048 --weight_decay 0.01 --logging_steps 1 "
        "--save_strategy epoch --eval_strategy epoch --save_total_limit 2 --save_only_model True --report_to none "
        "--do_train --do_eval --load_in_4bit --bnb_4bit_quant_type nf4 --bnb_4bit_compute_dtype bfloat16 "
        "--optim PagedAdam32bit rows.jsonl"
    )
    options = run(*typed.split())
    assert options == TrainOptions(
        learning_rate=1e-5, batch_size=1, accumulation=8, rank=32, alpha=64, dropout=0.05, max_length=2048, epochs=3,
        targets=("q_proj", "v_proj", "k_proj", "o_proj"), weight_decay=0.01, save_only_model=True, quantize="nf4",
        precision="bf16", optimizer="paged_adam",
    )  # fmt: skip


def test_other_names_become_settings_and_the_rest_stays() -> None:
    assert own_spelling(["--use_dora", "x.jsonl", "--name", "n"], FLAGS) == [
        "--set",
        "use_dora=true",
        "x.jsonl",
        "--name",
        "n",
    ]
    assert own_spelling(["--learning_rate=1", "--nothing", "7"], FLAGS) == ["--learning-rate=1", "--nothing", "7"]
    assert own_spelling(["--fp16", "false"], FLAGS) == ["--set", "fp16=false"]


def test_flags_change_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_text('r = 4\nlr = 1e-3\ntarget_modules = ["q_proj"]\nuse_rslora = true\n')
    empty: dict[str, Any] = {}
    assert chosen_options(file, empty, ()) == TrainOptions(rank=4, learning_rate=1e-3, targets=("q_proj",), rslora=True)
    assert chosen_options(file, {"rank": "16", "dora": None}, ("lora_alpha=8",)).rank == 16
    file.write_text("r = ")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        chosen_options(file, empty, ())
    with pytest.raises(InvalidRequest, match="NAME=VALUE"):
        chosen_options(None, empty, ("rank",))
