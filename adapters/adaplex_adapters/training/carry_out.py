"""From a request to a result: what the command line and a job's process have in common. Reads the data, plans, loads
the base once, and trains one adapter or several on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaplex_adapters.training.conversations import read_examples
from adaplex_adapters.training.frozen_base import FrozenBase, load_frozen_base, load_tokenizer
from adaplex_adapters.training.methods.lora_bank import check_bankable
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.plan import (
    Plan,
    Site,
    check_plan,
    check_plans_together,
    make_plan,
    measure_site,
    plan_lines,
)
from adaplex_adapters.training.progress import NamedProgress, Progress, SeveralProgress
from adaplex_adapters.training.report.record import TrainResult
from adaplex_adapters.training.result import check_replaceable, clear_leftovers
from adaplex_adapters.training.rows import Rows, prepare_rows
from adaplex_adapters.training.run_folder import RunFolder, hold
from adaplex_adapters.training.tensorboard import TensorBoard
from adaplex_adapters.training.together import Task, train_together
from adaplex_adapters.training.trainer import Surroundings, train_rows


@dataclass(frozen=True)
class TrainRequest:
    """data, validation: files. base_folder: local, in Hugging Face layout. out: the adapter's folder; work: the run's.
    memory_limit: bytes, None for what is free.
    """

    data: Path
    base_folder: Path
    base_name: str
    out: Path
    work: Path
    options: TrainOptions
    validation: Path | None = None
    device: str = "auto"
    memory_limit: int | None = None

    def variants(self, options: Mapping[str, TrainOptions]) -> dict[str, TrainRequest]:
        """The same with other options, each in a folder of its own in `out` and `work`."""
        return {
            name: dataclasses.replace(self, options=other, out=self.out / name, work=self.work / name)
            for name, other in options.items()
        }


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the base is loaded."""

    rows: Rows
    site: Site
    plan: Plan


def prepare(request: TrainRequest) -> Prepared:
    """Read and check the data, and plan. Raises InvalidRequest naming bad lines, StartupError for a bad base."""
    check_replaceable(request.out)
    examples = read_examples(request.data)
    validation = None if request.validation is None else read_examples(request.validation)
    rows = prepare_rows(examples, load_tokenizer(request.base_folder), request.options, validation)
    site = measure_site(request.device, request.memory_limit, request.options.precision)
    return Prepared(rows, site, make_plan(request.base_folder, rows, request.options, site))


def carry_out(
    request: TrainRequest, resume: bool, shown: Progress, stop: Callable[[], bool] = lambda: False
) -> TrainResult:
    """Plan, refuse what cannot fit, load, train, write. Raises Paused when asked to stop."""
    with hold(request.work, resume, request.options.logging_steps) as folder:
        return carry_out_in(folder, request, shown, stop)


def carry_out_in(
    folder: RunFolder, request: TrainRequest, shown: Progress, stop: Callable[[], bool] = lambda: False
) -> TrainResult:
    """The same in a folder that is held already."""
    prepared = prepare(request)
    folder.log.write("plan", **prepared.plan.plain())
    for line in plan_lines(prepared.plan):
        shown.note(line)
    check_plan(prepared.plan, request.base_folder, prepared.rows, request.options, prepared.site)
    base = load_frozen_base(request.base_folder, request.base_name, request.device, request.options)
    return _train(folder, request, prepared, base, shown, stop)


def carry_out_several(
    requests: Mapping[str, TrainRequest], shown: Progress, stop: Callable[[], bool]
) -> Iterator[tuple[str, TrainResult]]:
    """One adapter for each request, one after another on one loaded base, that of the first. Those that are finished
    already are trained anew; a paused one goes on.
    """
    base: FrozenBase | None = None
    for name, request in requests.items():
        with hold(request.work, True, request.options.logging_steps) as folder:
            prepared = prepare(request)
            check_plan(prepared.plan, request.base_folder, prepared.rows, request.options, prepared.site)
            base = base or load_frozen_base(request.base_folder, request.base_name, request.device, request.options)
            shown.note(f"{name}:")
            yield name, _train(folder, request, prepared, base, shown, stop)
            folder.checkpoints.clear()


def carry_out_together(
    requests: Mapping[str, TrainRequest], shown: Progress, stop: Callable[[], bool]
) -> dict[str, TrainResult]:
    """One adapter for each request, all in the same forward passes over one loaded base; paused ones go on.

    Raises InvalidRequest where they cannot share passes, or do not fit into memory at one time.
    """
    with contextlib.ExitStack() as stack:
        folders = {n: stack.enter_context(hold(r.work, True, r.options.logging_steps)) for n, r in requests.items()}
        prepared = {name: prepare(request) for name, request in requests.items()}
        first = next(iter(requests.values()))
        check_plans_together([found.plan for found in prepared.values()])
        check_bankable([request.options for request in requests.values()])
        base = load_frozen_base(first.base_folder, first.base_name, first.device, first.options)
        tasks = {}
        for name, request in requests.items():
            folder, found = folders[name], prepared[name]
            progress = _told(folder, request, NamedProgress(name, shown))
            around = Surroundings(folder.checkpoints, stop, True, found.plan.total, request.data.name)
            tasks[name] = Task(found.rows, request.options, request.out, progress, around)
        results = train_together(tasks, base)
        for name, result in results.items():
            clear_leftovers(requests[name].out)
            folders[name].log.write("succeeded", result=plain_result(result))
            folders[name].checkpoints.clear()
        return results


def _train(
    folder: RunFolder,
    request: TrainRequest,
    prepared: Prepared,
    base: FrozenBase,
    shown: Progress,
    stop: Callable[[], bool],
) -> TrainResult:
    around = Surroundings(folder.checkpoints, stop, True, prepared.plan.total, request.data.name)
    result = train_rows(prepared.rows, base, request.out, request.options, _told(folder, request, shown), around)
    clear_leftovers(request.out)
    folder.log.write("succeeded", result=plain_result(result))
    return result


def _told(folder: RunFolder, request: TrainRequest, shown: Progress) -> Progress:
    """Everyone who is told how a run goes."""
    parts: list[Progress] = [shown, folder.log]
    if request.options.tensorboard:
        parts.append(TensorBoard(folder.path / "tensorboard"))
    return SeveralProgress(parts)


def plain_result(result: TrainResult) -> dict[str, Any]:
    """As JSON has it; `out` is the folder's name alone."""
    return {**dataclasses.asdict(result), "out": result.out.name}
