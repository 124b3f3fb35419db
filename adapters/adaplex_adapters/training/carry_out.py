"""From a request to a result: what the command line and a job's process have in common. Reads the data, plans, loads
the base once, and trains one adapter or several on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaplex_adapters.training.conversations import read_examples
from adaplex_adapters.training.frozen_base import FrozenBase, load_frozen_base, load_tokenizer
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.plan import Plan, Site, check_plan, make_plan, measure_site, plan_lines
from adaplex_adapters.training.progress import Progress, SeveralProgress
from adaplex_adapters.training.report.record import TrainResult
from adaplex_adapters.training.result import check_replaceable
from adaplex_adapters.training.rows import Rows, prepare_rows
from adaplex_adapters.training.run_folder import RunFolder, hold
from adaplex_adapters.training.tensorboard import TensorBoard
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
    request: TrainRequest, variants: dict[str, TrainOptions], shown: Progress, stop: Callable[[], bool]
) -> Iterator[tuple[str, TrainResult]]:
    """One adapter for each variant, one after another on one loaded base, into out/NAME and work/NAME. Those that
    are finished already are trained anew; a paused one goes on.
    """
    base: FrozenBase | None = None
    for name, options in variants.items():
        own = dataclasses.replace(request, options=options, out=request.out / name, work=request.work / name)
        with hold(own.work, True, options.logging_steps) as folder:
            prepared = prepare(own)
            check_plan(prepared.plan, own.base_folder, prepared.rows, options, prepared.site)
            base = base or load_frozen_base(own.base_folder, own.base_name, own.device, options)
            shown.note(f"{name}:")
            yield name, _train(folder, own, prepared, base, shown, stop)
            folder.checkpoints.clear()


def _train(
    folder: RunFolder,
    request: TrainRequest,
    prepared: Prepared,
    base: FrozenBase,
    shown: Progress,
    stop: Callable[[], bool],
) -> TrainResult:
    parts: list[Any] = [shown, folder.log]
    if request.options.tensorboard:
        parts.append(TensorBoard(folder.path / "tensorboard"))
    around = Surroundings(folder.checkpoints, stop, True, prepared.plan.total, request.data.name)
    result = train_rows(prepared.rows, base, request.out, request.options, SeveralProgress(parts), around)
    folder.log.write("succeeded", result=plain_result(result))
    return result


def plain_result(result: TrainResult) -> dict[str, Any]:
    """As JSON has it; `out` is the folder's name alone."""
    return {**dataclasses.asdict(result), "out": result.out.name}
