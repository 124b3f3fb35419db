"""`adaplex train` and `serve-train`: from a file of examples to an adapter that a server answers with. The trainer's
composition root.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaplex_adapters.errors import InvalidRequest, StartupError
from adaplex_adapters.names import check_name
from adaplex_adapters.training.options import TrainOptions
from adaplex_server.cli.adapters import add_adapter
from adaplex_server.cli.remote import DEFAULT_SERVER
from adaplex_server.cli.run import run
from adaplex_server.cli.train_options import TrainCommand, with_train_options
from adaplex_server.settings import SERVER_VARIABLE, default_data_dir

if TYPE_CHECKING:
    from adaplex_adapters.base_shape import BaseShape
    from adaplex_adapters.training.carry_out import TrainRequest
    from adaplex_adapters.training.report.record import TrainResult

PROBE_SECONDS = 2.0

PLACES, RUN = "Data and result", "Run"


@with_train_options
def train_command(
    data: Annotated[
        Path, typer.Argument(help="JSONL: chats with 'messages', 'prompt' and 'completion', or 'text'; or a .txt file.")
    ],
    name: Annotated[str, typer.Option(help="What clients will call the adapter.", rich_help_panel=PLACES)],
    base: Annotated[
        str | None,
        typer.Option(help="The base: a folder or a hub name. (default: the embedded one)", rich_help_panel=PLACES),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="Rows to measure with. (default: some of the data are held out)", rich_help_panel=PLACES),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The adapter's folder; the log and the checkpoints go to OUT.run. (default: ./NAME)",
            rich_help_panel=PLACES,
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="Register with the server at this URL. (default: the one at 127.0.0.1:8000 if it answers, else "
            "the data folder, from where the next `adaplex serve` serves it)",
            envvar=SERVER_VARIABLE,
            rich_help_panel=PLACES,
        ),
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(help="Write DIR/NAME instead, for a server started with --adapters DIR.", rich_help_panel=PLACES),
    ] = None,
    register: Annotated[
        bool, typer.Option(help="Make the result known to a server or the data folder.", rich_help_panel=PLACES)
    ] = True,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what it would take, load nothing.", rich_help_panel=RUN)
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.run.", rich_help_panel=RUN)
    ] = False,
    sweep: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=A,B",
            help="Train one adapter for each of the values (of each combination, if repeated) on one loaded base, and "
            "take the best.",
            rich_help_panel=RUN,
        ),
    ] = [],  # noqa: B006 (typer copies it)
    together: Annotated[
        bool,
        typer.Option(
            "--together", help="Train the sweep's adapters in the same passes (plain LoRA).", rich_help_panel=RUN
        ),
    ] = False,
    memory: Annotated[
        int | None, typer.Option(help="MiB that the run may take. (default: what is free)", rich_help_panel=RUN)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=RUN)] = "auto",
    *,
    options: TrainOptions,
) -> None:
    """Train an adapter on the quantized base that serves it (QLoRA and other methods), and register it.

    The loss is taken on the answers alone. The data are checked before anything is loaded. A run that is interrupted
    (Ctrl-C, SIGTERM, kill -9) goes on with --resume, to the same adapter.

    Examples:

      serve-train support.jsonl --name support

      serve-train support.jsonl --name support --rank 16 --epochs 2 --server http://127.0.0.1:8000

      serve-train support.jsonl --name support --sweep rank=4,16 --sweep learning_rate=5e-4,2e-3
    """
    check_name(name)
    if out is not None and adapters is not None:
        raise InvalidRequest("give --out or --adapters, not both", param="out")
    folder = adapters / name if adapters is not None else out or Path(name)
    request, shape = _request(data, validation, base, folder, options, device, memory)
    if plan:
        _show_plan(request)
        return
    results = _train(request, sweep, together, resume)
    if not results:
        return
    show(results)
    if register and adapters is None:
        _register(name, folder, shape, server)


def _request(
    data: Path,
    validation: Path | None,
    base: str | None,
    folder: Path,
    options: TrainOptions,
    device: str,
    memory: int | None,
) -> tuple[TrainRequest, BaseShape]:
    """What to train, and the shape of the base it is for. Bad data is told before the base is looked for."""
    from adaplex_adapters.training.carry_out import TrainRequest
    from adaplex_adapters.training.conversations import read_examples
    from adaplex_server.bases.locate import locate_base
    from adaplex_server.model.config import read_config
    from adaplex_server.model.families import base_shape

    read_examples(data)
    located = locate_base(base, lambda text, fraction: print(text) if fraction in (0.0, 1.0) else None)
    shape = base_shape(read_config(located.folder, located.name))
    request = TrainRequest(
        data=data,
        validation=validation,
        base_folder=located.folder,
        base_name=located.name,
        out=folder,
        work=folder.with_name(f"{folder.name}.run"),
        options=options,
        device=device,
        memory_limit=None if memory is None else memory * 2**20,
    )
    return request, shape


def _show_plan(request: TrainRequest) -> None:
    from adaplex_adapters.training.carry_out import prepare
    from adaplex_adapters.training.plan import check_plan, plan_lines

    prepared = prepare(request)
    for line in (*prepared.rows.report.notes(request.options.max_length), *plan_lines(prepared.plan)):
        print(line)
    check_plan(prepared.plan, request.base_folder, prepared.rows, request.options, prepared.site)


def _train(request: TrainRequest, sweep: Sequence[str], together: bool, resume: bool) -> dict[str, TrainResult]:
    """Results by name, one unless there is a sweep; empty when it was paused."""
    from adaplex_adapters.training.carry_out import carry_out, carry_out_several, carry_out_together
    from adaplex_adapters.training.progress import ShownProgress
    from adaplex_adapters.training.stopping import stop_on_signals
    from adaplex_adapters.training.sweep import best_of, variants_of
    from adaplex_adapters.training.trainer import Paused

    with ShownProgress() as progress, stop_on_signals() as stop:
        try:
            if not sweep:
                return {request.out.name: carry_out(request, resume, progress, stop)}
            inside = dataclasses.replace(request, out=request.work / "variants", work=request.work / "variants.run")
            requests = inside.variants(variants_of(sweep, request.options))
            if together:
                results = carry_out_together(requests, progress, stop)
            else:
                results = dict(carry_out_several(requests, progress, stop))
        except Paused as paused:
            progress.note(f"paused after step {paused.step}; the same command with --resume goes on")
            return {}
    best = best_of(results, request.options) or next(iter(results))
    shutil.copytree(results[best].out, request.out, dirs_exist_ok=True)
    print(f"best: {best}, copied to {request.out}; all are in {inside.out}")
    return results


def show(results: Mapping[str, TrainResult]) -> None:
    """What came out, as a table on standard output: a column for each adapter."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *results)
    for field in dataclasses.fields(next(iter(results.values()))):
        table.add_row(field.name.replace("_", " "), *(_shown(getattr(r, field.name)) for r in results.values()))
    Console(width=100 if len(results) == 1 else None).print(table)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {figure:.3f}" for name, figure in value.items()) or "-"
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _register(name: str, folder: Path, shape: BaseShape, server: str | None) -> None:
    if server is not None or _answers(DEFAULT_SERVER):
        add_adapter(name, folder, server or DEFAULT_SERVER)
        return
    data_dir = Path(os.environ.get("ADAPLEX_DATA_DIR") or default_data_dir()) / shape.name
    register_in_folder(name, folder, shape, data_dir)
    print(f"registered {name} in {data_dir}; `adaplex serve` will serve it")


def _answers(server: str) -> bool:
    """Whether an Adaplex server is ready there."""
    import httpx

    try:
        return httpx.get(f"{server}/ready", timeout=PROBE_SECONDS).is_success
    except httpx.HTTPError:
        return False


def register_in_folder(name: str, folder: Path, shape: BaseShape, data_dir: Path) -> None:
    """Put the adapter into the store and the catalogue of `data_dir`, which no server may be using (StartupError)."""
    from adaplex_adapters.catalogue import Catalogue
    from adaplex_adapters.reader import read_adapter
    from adaplex_adapters.store import AdapterStore

    adapter = read_adapter(folder, shape)
    try:
        catalogue = Catalogue(data_dir / "catalogue.sqlite3")
    except StartupError as error:
        raise StartupError(
            f"{error.message} The adapter is in {folder}: add it with `adaplex adapters add`."
        ) from error
    try:
        AdapterStore(data_dir / "adapters").commit(adapter)
        catalogue.put(name, adapter.spec, "trainer")
    finally:
        catalogue.close()


def main() -> None:
    """The entry point of `serve-train`."""
    application = typer.Typer(pretty_exceptions_enable=False)
    application.command("serve-train", cls=TrainCommand)(train_command)
    run(application)
