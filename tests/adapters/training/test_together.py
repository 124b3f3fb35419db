"""Adapters trained in the same passes become what each becomes alone."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.reader import read_unfitted
from adaplex_adapters.training.checkpoints import Checkpoints
from adaplex_adapters.training.conversations import Completion
from adaplex_adapters.training.frozen_base import FrozenBase, load_frozen_base
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.rows import prepare_rows
from adaplex_adapters.training.together import Task, train_together
from adaplex_adapters.training.trainer import Paused, Surroundings, train_rows
from support.quiet_progress import Quiet

PLAIN = TrainOptions(batch_size=4, epochs=2.0, held_out=0.2, rank=4, precision="fp32", quantize="none", metrics=("f1",))
VARIANTS = {
    "plain": PLAIN,
    "faster": replace(PLAIN, learning_rate=5e-3, seed=4),
    "small": replace(PLAIN, rank=2, targets=("q_proj", "down_proj"), batch_size=3),
    "scaled": replace(PLAIN, rslora=True, epochs=1.0),
}


def rows_of(base: FrozenBase, name: str) -> Any:
    """Everyone has rows of its own, of other lengths and numbers."""
    start = sorted(VARIANTS).index(name) * 37
    examples = tuple(
        Completion(i + 1, f"{start + i} {'and ' * (i % 3)}is", f" {2 * i}") for i in range(16 + start // 9)
    )
    return prepare_rows(examples, base.tokenizer, VARIANTS[name])


@pytest.fixture(scope="module")
def base(base_folder: Path) -> FrozenBase:
    return load_frozen_base(base_folder, "tiny", "cpu", PLAIN)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_is_what_it_is_alone(checkpointing: bool, base: FrozenBase, tmp_path: Path) -> None:
    chosen = {n: replace(o, gradient_checkpointing=checkpointing) for n, o in VARIANTS.items()}
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    told = {name: Quiet() for name in chosen}
    tasks = {n: Task(rows_of(base, n), o, tmp_path / n, told[n], Surroundings()) for n, o in chosen.items()}
    results = train_together(tasks, base)
    after = base.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    for name, options in chosen.items():
        alone = Quiet()
        wanted = train_rows(rows_of(base, name), base, tmp_path / "alone", options, alone)
        found = results[name]
        assert told[name].losses == pytest.approx(alone.losses, rel=1e-3), name
        assert found.held_out_after == pytest.approx(wanted.held_out_after, rel=1e-3)
        assert found.held_out_before == pytest.approx(wanted.held_out_before, rel=1e-5)
        assert found.metrics_after.keys() == {"f1"} and (found.steps, found.tokens) == (wanted.steps, wanted.tokens)
        ours, theirs = (read_unfitted(tmp_path / folder) for folder in (name, "alone"))
        assert ours.modules.keys() == theirs.modules.keys()
        for path, module in ours.modules.items():
            other = theirs.modules[path]
            assert module.scaling == other.scaling
            delta, wanted_delta = (m.b.float() @ m.a.float() for m in (module, other))
            assert float((delta - wanted_delta).norm()) <= 0.05 * float(wanted_delta.norm()) + 1e-4, path


def test_alike_adapters_take_the_stacked_products(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaplex_adapters.training.methods import lora_bank

    calls: list[int] = []
    stacked = lora_bank._stacked
    monkeypatch.setattr(lora_bank, "_stacked", lambda x, *rest: calls.append(len(x)) or stacked(x, *rest))
    rows = rows_of(base, "plain")
    chosen = {f"seed {i}": replace(PLAIN, seed=i, held_out=0.0, metrics=()) for i in range(3)}
    told = {name: Quiet() for name in chosen}
    train_together({n: Task(rows, o, tmp_path / n, told[n], Surroundings()) for n, o in chosen.items()}, base)
    assert calls and set(calls) <= {12, 3, 6, 9}
    for name, options in chosen.items():
        alone = Quiet()
        train_rows(rows, base, tmp_path / "alone", options, alone)
        assert told[name].losses == pytest.approx(alone.losses, rel=1e-3)


def test_a_pause_keeps_everyones_place(base: FrozenBase, tmp_path: Path) -> None:
    chosen = {n: replace(VARIANTS[n], epochs=1.0, metrics=()) for n in ("plain", "small")}
    told = {name: Quiet() for name in chosen}
    whole = {n: Task(rows_of(base, n), o, tmp_path / n, told[n], Surroundings()) for n, o in chosen.items()}
    results = train_together(whole, base)
    parts: dict[str, dict[int, float]] = {name: {} for name in chosen}
    for _ in range(max(found.steps for found in results.values())):  # one step for each life
        tasks = {n: paused_at_once(task, tmp_path / f"{n}-parts") for n, task in whole.items()}
        with suppress(Paused):
            train_together(tasks, base)
        for name, task in tasks.items():
            assert isinstance(task.progress, Quiet) and not parts[name].keys() & task.progress.losses.keys()
            parts[name] |= task.progress.losses
    for name in chosen:
        assert parts[name] == pytest.approx(told[name].losses, rel=1e-3)


def paused_at_once(task: Task, out: Path) -> Task:
    """The task with a checkpoint after its first step."""
    around = Surroundings(Checkpoints(out.with_name(f"{out.name}-checkpoints")), lambda: True)
    return replace(task, out=out, progress=Quiet(), surroundings=around)


def test_what_cannot_share_passes_is_refused(base: FrozenBase, tmp_path: Path) -> None:
    for other in (replace(PLAIN, dora=True), replace(PLAIN, method="ia3"), replace(PLAIN, accumulation=2)):
        tasks = {
            name: Task(rows_of(base, "plain"), options, tmp_path / name, Quiet(), Surroundings())
            for name, options in (("a", PLAIN), ("b", other))
        }
        with pytest.raises(InvalidRequest, match="together"):
            train_together(tasks, base)
