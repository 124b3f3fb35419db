"""A run that is stopped, or killed, goes on to the same adapter: equal losses, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from adaplex_adapters.errors import Conflict, StorageFailed
from adaplex_adapters.reader import read_unfitted
from adaplex_adapters.training.checkpoints import Checkpoints
from adaplex_adapters.training.conversations import Completion
from adaplex_adapters.training.events import read_events
from adaplex_adapters.training.frozen_base import FrozenBase, load_frozen_base
from adaplex_adapters.training.job import run_job
from adaplex_adapters.training.job_terms import FAILED, PAUSED, REFUSED, SUCCEEDED
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.run_folder import hold
from adaplex_adapters.training.trainer import Paused, Surroundings, train_adapter
from support.quiet_progress import Quiet

ROWS = tuple(Completion(i + 1, f"{i} and {i} is", f" {2 * i}") for i in range(24))
CASES: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.3, "accumulation": 2},
    "prefix": {"method": "prefix_tuning", "virtual_tokens": 3},
    "fp16": {"precision": "fp16", "quantize": "none"},
    "steps": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3, "keep_best": True},
}


def options(**given: Any) -> TrainOptions:
    return TrainOptions(**{"batch_size": 4, "epochs": 2.0, "held_out": 0.2, "rank": 2, "seed": 3, **given})


@pytest.fixture(scope="module")
def base(base_folder: Path) -> FrozenBase:
    return load_frozen_base(base_folder, "tiny", "cpu")


@pytest.mark.parametrize("name", CASES)
def test_a_paused_run_goes_on_as_if_nothing_had_happened(
    name: str, base_folder: Path, base: FrozenBase, tmp_path: Path
) -> None:
    given = options(**CASES[name])
    used = load_frozen_base(base_folder, "tiny", "cpu", given) if "precision" in CASES[name] else base
    whole = Quiet()
    result = train_adapter(ROWS, used, tmp_path / "whole", given, whole)
    parts: dict[int, float] = {}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for _ in range(result.steps):  # one step for each life
        quiet = Quiet()
        around = Surroundings(checkpoints, lambda: True)
        try:
            train_adapter(ROWS, used, tmp_path / "parts", given, quiet, around)
        except Paused as paused:
            assert paused.step == max(quiet.losses) and checkpoints.steps()[-1] == paused.step
        assert not parts.keys() & quiet.losses.keys()
        parts |= quiet.losses
    assert parts == whole.losses
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("whole", "parts")]
    assert files[0] == files[1]


def test_checkpoints_are_few_and_the_best_one_stays(base: FrozenBase, tmp_path: Path) -> None:
    given = options(save_strategy="steps", save_steps=1, save_total_limit=2, save_only_model=True, epochs=4.0)
    checkpoints, quiet = Checkpoints(tmp_path / "c"), Quiet()
    result = train_adapter(ROWS, base, tmp_path / "out", given, quiet, Surroundings(checkpoints))
    assert quiet.checkpoints == list(range(1, result.steps + 1))
    assert checkpoints.steps() == sorted({result.best_step, result.steps - 1, result.steps})
    sizes = [sum(f.stat().st_size for f in checkpoints.path(step).iterdir()) for step in checkpoints.steps()[-2:]]
    assert sizes[0] < 0.6 * sizes[1]  # older ones have no optimizer


def test_the_best_weights_are_the_result_and_training_stops_early(base: FrozenBase, tmp_path: Path) -> None:
    given = options(learning_rate=0.3, warmup=0, epochs=30.0, early_stopping=2, schedule="constant")
    quiet = Quiet()
    result = train_adapter(ROWS, base, tmp_path / "out", given, quiet)
    losses = {m.step: m.loss for m in quiet.measurements}
    best = min(losses, key=lambda step: losses[step])
    assert result.best_step == best and result.held_out_after == pytest.approx(losses[best], rel=0.02)
    after = [step for step in losses if step > best]
    assert len(after) == 2 and result.steps == after[-1] and any("stopped early" in n for n in quiet.notes)


def test_checkpoints_of_something_else_are_refused(base: FrozenBase, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c")
    with pytest.raises(Paused):
        train_adapter(ROWS, base, tmp_path / "out", options(), Quiet(), Surroundings(checkpoints, lambda: True))
    for rows, given in ((ROWS[1:], options()), (ROWS, options(rank=4)), (ROWS, options(epochs=3.0))):
        with pytest.raises(Conflict, match="other data, options or base"):
            train_adapter(rows, base, tmp_path / "out", given, Quiet(), Surroundings(checkpoints))
    train_adapter(ROWS, base, tmp_path / "out", options(save_total_limit=5), Quiet(), Surroundings(checkpoints))
    (checkpoints.path(checkpoints.steps()[-1]) / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(StorageFailed, match="cannot be read"):
        train_adapter(ROWS, base, tmp_path / "out", options(save_total_limit=5), Quiet(), Surroundings(checkpoints))


def test_a_killed_job_loses_nothing(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 in the middle, SIGTERM later, then to the end: the figures of every step are those of a quiet run."""
    for name in ("quiet", "hunted"):
        write_job(tmp_path / name, base_folder)
    assert run_job(tmp_path / "quiet") == SUCCEEDED

    job = tmp_path / "hunted"
    process = start(job)
    wait_for(job, process, "checkpoint")
    process.kill()
    process.wait(30)
    with (job / "events.jsonl").open("ab") as log:
        log.write(b'{"seq": 999, "type": "st')  # as if it had been killed in the middle of a line
    with monkeypatch.context() as patch:
        patch.setattr("adaplex_adapters.training.job.LineProgress", StopsItself)
        assert run_job(job) == PAUSED
    assert list(read_events(job))[-1]["type"] == "paused"
    assert run_job(job) == SUCCEEDED

    events = list(read_events(job))
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
    assert events[-1]["type"] == "succeeded" and sum(e["type"] == "started" for e in events) >= 2
    assert losses(job) == losses(tmp_path / "quiet")
    revisions = [read_unfitted(tmp_path / n / "result").spec.revision for n in ("quiet", "hunted")]
    assert revisions[0] == revisions[1]
    assert run_job(job) == SUCCEEDED and len(list(read_events(job))) == len(events)  # it had succeeded


class StopsItself(Quiet):
    """Sends this process SIGTERM after two steps."""

    def __init__(self, stream: object) -> None:
        super().__init__()

    def step(self, report: Any) -> None:
        super().step(report)
        if len(self.losses) == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def write_job(folder: Path, base_folder: Path) -> None:
    folder.mkdir()
    rows = [{"prompt": f"{i} and {i} is", "completion": f" {2 * i}"} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"n_epochs": 6, "batch_size": 4, "r": 2, "lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 3}
    job = {"version": 1, "data": "train.jsonl", "base": {"folder": str(base_folder), "name": "tiny"}, "options": given}
    (folder / "job.json").write_text(json.dumps(job | {"threads": 1, "device": "cpu"}))


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-m", "adaplex_adapters.training.job", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(folder: Path, process: subprocess.Popen[bytes], kind: str) -> None:
    """Until this process has told such an event, or is gone."""
    for _ in range(6000):
        own = False
        for event in read_events(folder) if (folder / "events.jsonl").is_file() else ():
            own = own or event.get("pid") == process.pid
            if own and event["type"] == kind:
                return
        if process.poll() is not None:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {kind}")


def losses(folder: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_events(folder) if e["type"] == "step"}


def test_a_folder_is_held_by_one_and_a_failed_job_says_why(base_folder: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    write_job(job, base_folder)
    with hold(job, resume=True):
        assert run_job(job) == REFUSED
    (job / "train.jsonl").write_text('{"prompt": "x"}\n')
    assert run_job(job) == FAILED
    last = list(read_events(job))[-1]
    assert (last["type"], last["error"], last["param"]) == ("failed", "InvalidRequest", "data")
    assert "line 1" in last["message"]
    code = json.loads((job / "job.json").read_text())
    code["options"]["metrics"] = ["os:getcwd"]
    (job / "job.json").write_text(json.dumps(code))
    assert run_job(job) == FAILED and "os:getcwd" in list(read_events(job))[-1]["message"]
    (job / "job.json").write_text("{}")
    assert run_job(job) == REFUSED
