"""`serve-train` from a file to a folder, on a base that trains in a second."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from adaplex_adapters.errors import AdaplexError, Conflict, InvalidRequest
from adaplex_adapters.training.events import read_events
from adaplex_server.cli.train import train_command
from adaplex_server.cli.train_options import TrainCommand
from support.quiet_progress import Quiet
from support.tiny_base import make_base, make_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("cli") / "tiny", make_tokenizer())


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    rows = [{"prompt": f"{i} is", "completion": f" {2 * i}"} for i in range(24)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(base: Path, *arguments: str) -> str:
    application = typer.Typer()
    application.command(cls=TrainCommand)(train_command)
    fixed = ["rows.jsonl", "--name", "sums", "--base", str(base), "--no-register", "--batch-size", "8", "--rank", "2"]
    result = CliRunner().invoke(application, [*fixed, *arguments], catch_exceptions=True)
    if isinstance(result.exception, AdaplexError):
        raise result.exception
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_a_file_becomes_an_adapter_with_its_log_and_report(base: Path) -> None:
    shown = run(base, "--max_steps", "2", "--report_to=tensorboard", "--metrics", "exact_match", "--metric-rows", "1")
    assert "held out after" in shown and "peak bytes" in shown
    folder = Path("sums")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "report.html"} <= set(os.listdir(folder))
    kinds = [event["type"] for event in read_events(Path("sums.run"))]
    assert kinds[0] == "plan" and kinds[-1] == "succeeded" and kinds.count("step") == 2
    assert any(Path("sums.run/tensorboard").iterdir())


def test_the_plan_loads_nothing_and_refuses_what_cannot_fit(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("adaplex_adapters.training.carry_out.load_frozen_base", never)
    shown = run(base, "--plan")
    for said in ("weights to train", "base", "gradients", "optimizer", "activations", "together", "free", "about"):
        assert said in shown, said
    with pytest.raises(InvalidRequest, match="GiB are free"):
        run(base, "--memory", "1")
    assert not Path("sums").exists()


def test_a_paused_run_goes_on(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StopsItself(Quiet):
        def __init__(self, *_: Any) -> None:
            super().__init__()

        def step(self, report: Any) -> None:
            super().step(report)
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("adaplex_adapters.training.progress.LineProgress", StopsItself)
        run(base, "--max-steps", "3")
    assert not Path("sums").exists()
    with pytest.raises(Conflict, match="--resume"):
        run(base, "--max-steps", "3")
    run(base, "--max-steps", "3", "--resume")
    steps = [event["step"] for event in read_events(Path("sums.run")) if event["type"] == "step"]
    assert steps == [1, 2, 3] and Path("sums/adapter_config.json").is_file()
    run(base, "--max-steps", "1")  # a finished one makes way


@pytest.mark.parametrize("way", [(), ("--together",)])
def test_a_sweep_takes_the_best(way: tuple[str, ...], base: Path) -> None:
    swept = ("--sweep", "rank=2,4", "--sweep", "learning_rate=1e-5,1e-2")
    shown = run(base, "--max-steps", "2", "--held-out", "0.3", *swept, *way)
    assert "rank=4-learning_rate=1e-2" in shown and "best: rank=" in shown and "learning_rate=1e-2, copied" in shown
    assert len(list(Path("sums.run/variants").iterdir())) == 4 and Path("sums/adapter_config.json").is_file()


def test_bad_rows_are_told_before_anything_is_loaded(base: Path) -> None:
    Path("rows.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(InvalidRequest, match="line 1"):
        run(base / "not-there")
