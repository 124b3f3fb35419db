"""The trainer: the one place that calls the steps of training in order.

`Run` owns what changes while an adapter is trained; with `Checkpoints` it can be stopped at any moment, by a signal or
by kill -9, and goes on from the last checkpoint to the same adapter, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from adaplex_adapters.training.batches import Batch, batches_per_epoch, shuffled_batches
from adaplex_adapters.training.checkpoints import Checkpoint, Checkpoints
from adaplex_adapters.training.conversations import Example
from adaplex_adapters.training.encoding import EncodedExample
from adaplex_adapters.training.frozen_base import FrozenBase
from adaplex_adapters.training.loop import Course, StepReport
from adaplex_adapters.training.measuring import Measurement, Measuring
from adaplex_adapters.training.memory import peak_bytes, reset_peak
from adaplex_adapters.training.methods.adapter import TrainedAdapter
from adaplex_adapters.training.methods.attach import attach_adapter
from adaplex_adapters.training.options import TrainOptions, plain_fields
from adaplex_adapters.training.packing import check_packable, pack
from adaplex_adapters.training.progress import Progress
from adaplex_adapters.training.report.record import RunRecord, Sample, TrainResult
from adaplex_adapters.training.report.writer import write_report
from adaplex_adapters.training.result import check_replaceable, save_adapter
from adaplex_adapters.training.rows import Rows, prepare_rows

SAVED_DTYPE = torch.bfloat16
LONGEST_CURVE = 4000
CHECKPOINT_SECONDS = 10.0
FEWEST_JUDGES = 5
"""Held-out rows without which no measurement is called the best: on one or two of them it would be chance."""
# What may differ between the parts of an interrupted run: it changes no weight.
_FREE_TO_CHANGE = ("logging_steps", "tensorboard", "save_strategy", "save_steps", "save_total_limit", "save_only_model")


class Paused(Exception):
    """Training was asked to stop and has written a checkpoint; step: updates done."""

    def __init__(self, step: int) -> None:
        super().__init__(f"paused after step {step}")
        self.step = step


@dataclass(frozen=True)
class Surroundings:
    """What is around a run. checkpoints: None for a run that cannot be resumed. stop: asked after each step; True
    ends it with a checkpoint and Paused. report: whether the folder gets a model card, plots and a page beside the
    adapter. planned_bytes: the plan's memory, to stand beside the measured.
    """

    checkpoints: Checkpoints | None = None
    stop: Callable[[], bool] = lambda: False
    report: bool = False
    planned_bytes: int | None = None
    source: str | None = None


@dataclass
class _Kept:
    """What a checkpoint keeps beside weights and optimizer. Owned by Run; plain numbers, as JSON has them.

    curve: [step, loss, rate] of the steps so far, thinned. history: measurements. stale: those since the best one.
    """

    before: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    stale: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    base_answers: list[str] = field(default_factory=list)


def train_adapter(
    examples: tuple[Example, ...],
    base: FrozenBase,
    out: Path,
    options: TrainOptions,
    progress: Progress,
    surroundings: Surroundings = Surroundings(),
) -> TrainResult:
    """Train a fresh adapter on the examples, hold some out to measure it, and write it to `out`."""
    return train_rows(prepare_rows(examples, base.tokenizer, options), base, out, options, progress, surroundings)


def train_rows(
    rows: Rows,
    base: FrozenBase,
    out: Path,
    options: TrainOptions,
    progress: Progress,
    surroundings: Surroundings = Surroundings(),
) -> TrainResult:
    """The same for rows that are prepared. The base is afterwards what it was: the next adapter can be trained on it.

    Raises Paused when asked to stop, InvalidRequest when the loss diverges or an option does not fit the base,
    Conflict for a folder or checkpoints of something else.
    """
    check_replaceable(out)
    for note in rows.report.notes(options.max_length):
        progress.note(note)
    run = Run(rows, base, attach_adapter(base, options), options, progress, surroundings)
    try:
        for group in run.train():
            run.course.learn(group)
        return run.finish(out)
    finally:
        run.adapter.detach()


class Run:
    """One adapter's training. Owns the course, the best weights and the record of what happened."""

    def __init__(
        self,
        rows: Rows,
        base: FrozenBase,
        adapter: TrainedAdapter,
        options: TrainOptions,
        progress: Progress,
        surroundings: Surroundings,
    ) -> None:
        self._rows, self._base, self._options = rows, base, options
        self._progress, self._around = progress, surroundings
        self._learned = _sequences(rows, base, options)
        self._pad = pad_id(base.tokenizer)
        self._steps = count_steps(len(self._learned), options)
        reset_peak(base.device)
        self.adapter = adapter
        self._parameters = sum(p.numel() for p in self.adapter.trained().values())
        rate = options.rate(base.hidden_size)
        self.course = Course(self.adapter, options, self._steps, rate, base.device)
        self._measuring = Measuring(base, self.adapter, rows, options, self._pad)
        self._best_weights: dict[str, torch.Tensor] = {}
        self._kept = _Kept()
        self._keeps_best = options.keep_best and len(rows.held_out) >= FEWEST_JUDGES
        self._saved_at = time.monotonic()
        self._digest = run_digest(rows, base, options)

    def train(self) -> Iterator[list[Batch]]:
        """Steps until the end, from the beginning or from the latest checkpoint. Yields the batches of each step:
        whoever drives the run makes their gradients (`course.learn`) before going on.
        """
        count, held = len(self._rows.train), len(self._rows.held_out)
        self._progress.note(f"{count} rows to learn, {held} held out, {self._parameters:,} weights to train")
        if not self._resume():
            self._measure_base()
        self._progress.begin(self._steps, self.course.step)
        batches = self._batches()
        began = time.monotonic()
        while self.course.step < self._steps:
            group = self.course.take(batches)
            yield group
            report = self.course.update(group)
            self._record(report)
            self._progress.step(report)
            stopping = self._around.stop()
            self._kept.seconds, began = self._kept.seconds + time.monotonic() - began, time.monotonic()
            measured = self._due(self._options.eval_strategy, self._options.eval_steps, at_end=True)
            stopped_early = measured and self._measure()
            if stopping or self._wants_checkpoint(measured):
                self._save()
            began = time.monotonic()
            if stopped_early:
                self._progress.note(f"stopped early: no better measurement in {self._options.early_stopping} of them")
                break
            if stopping and self.course.step < self._steps:
                raise Paused(self.course.step)
        self._progress.end()

    def finish(self, out: Path) -> TrainResult:
        """Take the best weights, round them, measure them once more, and write the result."""
        best = self._kept.best
        if self._keeps_best and self._best_weights:
            _load(self.adapter, self._best_weights)
        self.adapter.settle(SAVED_DTYPE)
        after = self._measuring.adapter(self.course.step)
        if after is not None:
            self._progress.note(f"held-out loss of the result: {after.loss:.4f}")
        record = self._record_of(out, best, after)
        files = self.adapter.files(self._base.name, SAVED_DTYPE)
        beside = (lambda folder: write_report(record, folder)) if self._around.report else None
        save_adapter(files, out, beside)
        return record.result

    def _batches(self) -> Iterator[Batch]:
        done = self.course.step * self._options.accumulation
        return shuffled_batches(self._learned, self._options.batch_size, self._pad, self._options.seed, done)

    def _resume(self) -> bool:
        found = None if self._around.checkpoints is None else self._around.checkpoints.latest(self._digest)
        if found is None:
            return False
        _load(self.adapter, found.weights)
        self._best_weights = found.best
        self.course.restore(found.course)
        self._kept = _Kept(**found.kept)
        self._progress.note(f"going on after step {found.step} of {self._steps}")
        return True

    def _measure_base(self) -> None:
        before = self._measuring.base_alone()
        if before is not None:
            self._kept.before, self._kept.base_answers = before.plain(), list(before.answers)
            metrics = "".join(f", {name} {value:.3f}" for name, value in before.metrics.items())
            self._progress.note(f"held-out loss of the base: {before.loss:.4f}{metrics}")

    def _measure(self) -> bool:
        """Measure, keep the weights if they are the best so far. Returns whether to stop early."""
        found = self._measuring.adapter(self.course.step)
        if found is None:
            return False
        name, best = self._options.best_by, self._kept.best
        figure = found.figure(name)
        better = best is None or figure < best["figure"] - self._options.early_stopping_threshold
        if better:
            self._kept.best = found.plain() | {"figure": figure}
            self._best_weights = {k: p.detach().cpu().clone() for k, p in self.adapter.trained().items()}
        self._kept.stale = 0 if better else self._kept.stale + 1
        self._kept.history.append(found.plain())
        self._progress.measured(found, better)
        patience = self._options.early_stopping
        return patience is not None and self._kept.stale >= patience

    def _save(self) -> None:
        if self._around.checkpoints is None:
            return
        self._saved_at = time.monotonic()
        best = None if self._kept.best is None else int(self._kept.best["step"])
        weights = {name: p.detach().cpu().clone() for name, p in self.adapter.trained().items()}
        state = Checkpoint(self._digest, self.course.state(), weights, self._best_weights, asdict(self._kept))
        options = self._options
        path = self._around.checkpoints.write(state, options.save_total_limit, best, options.save_only_model)
        self._progress.saved(self.course.step, path)

    def _wants_checkpoint(self, measured: bool) -> bool:
        """At every chosen step. At epochs and measurements, which may be a moment apart, only some seconds after the
        one before, and at the end.
        """
        options = self._options
        if options.save_strategy == "steps" and self._due("steps", options.save_steps, at_end=False):
            return True
        due = measured or self._due(options.save_strategy, options.save_steps, at_end=False)
        last = self.course.step == self._steps
        return due and (last or time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS)

    def _due(self, strategy: str, every: int, at_end: bool) -> bool:
        step = self.course.step
        if step == self._steps:
            return at_end and strategy != "no"
        if strategy == "steps":
            return step % every == 0
        per_epoch = batches_per_epoch(len(self._learned), self._options.batch_size) / self._options.accumulation
        return strategy == "epoch" and math.floor(step / per_epoch) > math.floor((step - 1) / per_epoch)

    def _record(self, report: StepReport) -> None:
        self._kept.tokens += report.tokens
        self._kept.curve.append([report.step, report.loss, report.learning_rate])
        if len(self._kept.curve) > LONGEST_CURVE:
            self._kept.curve = self._kept.curve[:1] + self._kept.curve[1::2]

    def _record_of(self, out: Path, best: dict[str, Any] | None, after: Measurement | None) -> RunRecord:
        kept, rows = self._kept, self._rows
        result = TrainResult(
            out=out,
            examples=len(rows.train),
            held_out=len(rows.held_out),
            too_long=len(rows.report.too_long),
            parameters=self._parameters,
            steps=self.course.step,
            tokens=kept.tokens,
            seconds=kept.seconds,
            loss_first=kept.curve[0][1],
            loss_last=kept.curve[-1][1],
            held_out_before=None if kept.before is None else kept.before["loss"],
            held_out_after=None if after is None else after.loss,
            metrics_before={} if kept.before is None else dict(kept.before["metrics"]),
            metrics_after={} if after is None else dict(after.metrics),
            best_step=int(best["step"]) if best is not None and self._keeps_best else None,
            peak_bytes=peak_bytes(self._base.device),
            planned_bytes=self._around.planned_bytes,
        )
        answers = () if after is None else after.answers
        samples = tuple(
            Sample.of(example, base, adapter)
            for example, base, adapter in zip(rows.asked, kept.base_answers, answers, strict=False)
        )
        curve = tuple((int(step), loss, rate) for step, loss, rate in kept.curve)
        history = tuple(kept.history)
        return RunRecord(
            result, self._options, rows.report, self._base.name, self._base.form, curve, history, samples,
            self._around.source,
        )  # fmt: skip


def count_steps(examples: int, options: TrainOptions) -> int:
    """Updates in a run: whole epochs of batches, accumulated, but at most `max_steps` and at least one."""
    planned = batches_per_epoch(examples, options.batch_size) * options.epoch_limit / options.accumulation
    return max(1, math.ceil(min(planned, options.max_steps or math.inf)))


def run_digest(rows: Rows, base: FrozenBase, options: TrainOptions) -> str:
    """SHA-256 (hex) of all that decides the weights: data, options, base and device type."""
    fields = {k: v for k, v in plain_fields(options).items() if k not in _FREE_TO_CHANGE}
    lines = [[e.line, len(e.ids)] for e in (*rows.train, *rows.held_out)]
    said = [rows.report.sha256, lines, base.name, base.form, base.device.type, fields]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def pad_id(tokenizer: Any) -> int:
    """A token to pad with; it is never attended to by what counts, and never learned."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found or 0)


def _sequences(rows: Rows, base: FrozenBase, options: TrainOptions) -> list[EncodedExample]:
    if not options.packing:
        return list(rows.train)
    config = base.model.config
    check_packable(config.model_type, getattr(config, "sliding_window", None), options.max_length)
    return pack(rows.train, options.max_length, options.seed)


@torch.no_grad()
def _load(adapter: TrainedAdapter, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in adapter.trained().items():
        parameter.copy_(weights[name])
