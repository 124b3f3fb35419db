"""Training several adapters in the same forward passes over one base. Each keeps its own rows, order, optimizer,
measurements and end, and becomes what it would be alone, but for the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from adaplex_adapters.training.answer_loss import causal_losses
from adaplex_adapters.training.batches import Batch, join_batches
from adaplex_adapters.training.frozen_base import FrozenBase
from adaplex_adapters.training.loop import share_factor
from adaplex_adapters.training.methods.adapter import ModelInputs
from adaplex_adapters.training.methods.lora_bank import BankedLora, LoraBank, check_bankable
from adaplex_adapters.training.micro_batch_graphs import MicroBatchGraphs, can_record
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.precision import mixed
from adaplex_adapters.training.progress import Progress
from adaplex_adapters.training.report.record import TrainResult
from adaplex_adapters.training.result import check_replaceable
from adaplex_adapters.training.rows import Rows
from adaplex_adapters.training.trainer import Paused, Run, Surroundings, pad_id


@dataclass(frozen=True)
class Task:
    """One adapter to train. progress: told of this adapter alone."""

    rows: Rows
    options: TrainOptions
    out: Path
    progress: Progress
    surroundings: Surroundings


@dataclass
class _Lane:
    """A run under way, the generator that drives it, and the batches of its next step (None: it has ended)."""

    index: int
    task: Task
    run: Run
    adapter: BankedLora
    steps: Iterator[list[Batch]]
    group: list[Batch] | None = None


def train_together(tasks: Mapping[str, Task], base: FrozenBase) -> dict[str, TrainResult]:
    """Train all, and write each to its own folder as soon as it ends.

    Raises InvalidRequest for adapters that cannot share passes, and what a run alone raises; an error or a pause of
    one ends all (each goes on from its own checkpoint).
    """
    check_bankable([task.options for task in tasks.values()])
    for task in tasks.values():
        check_replaceable(task.out)
    bank = LoraBank(base, [task.options for task in tasks.values()])
    results: dict[str, TrainResult] = {}
    try:
        lanes = {}
        for index, ((name, task), adapter) in enumerate(zip(tasks.items(), bank.adapters(), strict=True)):
            run = Run(task.rows, base, adapter, task.options, task.progress, task.surroundings)
            lanes[name] = _Lane(index, task, run, adapter, run.train())
        for name, lane in lanes.items():
            _go_on(name, lane, results)
        options = next(iter(tasks.values())).options
        able = all(can_record(base.model, task.options, base.device) for task in tasks.values())
        graphs = MicroBatchGraphs(base.model, options, base.device) if able else None
        while under_way := [lane for lane in lanes.values() if lane.group is not None]:
            _learn(under_way, bank, base, graphs)
            paused = [
                p for name, lane in lanes.items() if lane.group is not None and (p := _go_on(name, lane, results))
            ]
            if paused:
                raise Paused(max(p.step for p in paused))
    finally:
        bank.detach()
    return results


def _go_on(name: str, lane: _Lane, results: dict[str, TrainResult]) -> Paused | None:
    """The run's own work until it needs gradients, or to its end. A pause is handed back, so that the others too come
    to their checkpoint.
    """
    lane.adapter.choose()
    try:
        lane.group = next(lane.steps, None)
    except Paused as paused:
        return paused
    if lane.group is None:
        results[name] = lane.run.finish(lane.task.out)
    return None


def _learn(lanes: list[_Lane], bank: LoraBank, base: FrozenBase, graphs: MicroBatchGraphs | None) -> None:
    """Gradients of one step of every run: pass by pass, the batches of all in one."""
    options = lanes[0].task.options
    base.model.train()
    for index in range(options.accumulation):
        present = [(lane, lane.group[index]) for lane in lanes if lane.group is not None and index < len(lane.group)]
        batch = join_batches([batch for _, batch in present], pad_id(base.tokenizer))
        shares = [(lane.index, len(own.ids)) for lane, own in present]
        if graphs is not None and _replayed(graphs, bank, batch, present, shares):
            continue
        with mixed(options, base.device), bank.shared(shares):
            inputs = ModelInputs({"input_ids": batch.ids.to(base.device)})
            losses = causal_losses(base.model, inputs, batch, base.device, [rows for _, rows in shares])
        total = sum(
            lane.run.course.share_of(loss, lane.group or []) for (lane, _), loss in zip(present, losses, strict=True)
        )
        # The hooks are asked again where activations are computed anew in the backward pass.
        with bank.shared(shares):
            assert not isinstance(total, int)
            total.backward()


def _replayed(
    graphs: MicroBatchGraphs,
    bank: LoraBank,
    batch: Batch,
    present: list[tuple[_Lane, Batch]],
    shares: list[tuple[int, int]],
) -> bool:
    """The pass of all as a CUDA graph; False where there is none."""
    factors = [share_factor(lane.group or []) for lane, _ in present]
    with bank.shared(shares):
        found = graphs.learn(batch, factors, [rows for _, rows in shares], tuple(shares))
    if found is None:
        return False
    for (lane, _), loss in zip(present, found.unbind(), strict=True):
        lane.run.course.note(loss)
    return True
