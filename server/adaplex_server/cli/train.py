"""`adaplex train` and `serve-train`: from a JSONL file to an adapter that a server answers with. The trainer's
composition root.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaplex_adapters.errors import InvalidRequest, StartupError
from adaplex_adapters.names import check_name
from adaplex_server.cli.adapters import DEFAULT_SERVER, add_adapter
from adaplex_server.cli.run import run
from adaplex_server.settings import SERVER_VARIABLE, default_data_dir

if TYPE_CHECKING:
    from adaplex_adapters.training.trainer import TrainResult

PROBE_SECONDS = 2.0

DATA, MODEL, COURSE = "Data and result", "Adapter", "Training"


def train_command(
    data: Annotated[Path, typer.Argument(help="JSONL: chats with 'messages', or rows with 'prompt' and 'completion'.")],
    name: Annotated[str, typer.Option(help="What clients will call the adapter.", rich_help_panel=DATA)],
    base: Annotated[
        str | None,
        typer.Option(help="The base: a folder or a hub name. [default: the embedded one]", rich_help_panel=DATA),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The PEFT folder to write. [default: ./NAME]", rich_help_panel=DATA)
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="Register with the server at this URL. [default: the one at 127.0.0.1:8000 if it answers, else "
            "the data folder, from where the next `adaplex serve` serves it]",
            envvar=SERVER_VARIABLE,
            rich_help_panel=DATA,
        ),
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(help="Write DIR/NAME instead, for a server started with --adapters DIR.", rich_help_panel=DATA),
    ] = None,
    register: Annotated[
        bool, typer.Option(help="Make the result known to a server or the data folder.", rich_help_panel=DATA)
    ] = True,
    held_out: Annotated[
        float, typer.Option(help="Share of the prompts kept for measuring (at most 200).", rich_help_panel=DATA)
    ] = 0.05,
    max_length: Annotated[
        int, typer.Option(help="Tokens; longer rows are left out and listed.", rich_help_panel=DATA)
    ] = 1024,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA.", rich_help_panel=MODEL)] = 8,
    alpha: Annotated[
        float | None, typer.Option(help="Scaling is alpha / rank. [default: 2 x rank]", rich_help_panel=MODEL)
    ] = None,
    rslora: Annotated[bool, typer.Option(help="Scale by alpha / sqrt(rank).", rich_help_panel=MODEL)] = False,
    targets: Annotated[
        str, typer.Option(help="Modules to adapt, as q_proj,v_proj; all-linear for all.", rich_help_panel=MODEL)
    ] = "all-linear",
    dropout: Annotated[float, typer.Option(help="Dropout before the LoRA.", rich_help_panel=MODEL)] = 0.0,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=COURSE)] = 3.0,
    max_steps: Annotated[int | None, typer.Option(help="Updates at most.", rich_help_panel=COURSE)] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate. [default: 2e-4 x 4096 / width of the base]", rich_help_panel=COURSE),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a forward pass.", rich_help_panel=COURSE)] = 8,
    accumulation: Annotated[int, typer.Option(help="Forward passes an update.", rich_help_panel=COURSE)] = 1,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps with rising rate; cosine after.", rich_help_panel=COURSE)
    ] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=COURSE)] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0: none.", rich_help_panel=COURSE)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of split, order and first weights.", rich_help_panel=COURSE)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=COURSE)] = "auto",
) -> None:
    """Train a LoRA adapter (QLoRA) on the quantized base that serves it, and register it.

    The loss is taken on the answers alone. The data are checked before anything is loaded.

    Examples:

      serve-train support.jsonl --name support

      serve-train support.jsonl --name support --rank 16 --epochs 2 --server http://127.0.0.1:8000
    """
    from adaplex_adapters.training.conversations import read_examples
    from adaplex_adapters.training.options import TrainOptions

    check_name(name)
    chosen = TrainOptions(
        rank=rank,
        alpha=alpha,
        learning_rate=lr,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        accumulation=accumulation,
        max_length=max_length,
        warmup=warmup,
        weight_decay=weight_decay,
        dropout=dropout,
        clip=clip,
        held_out=held_out,
        rslora=rslora,
        targets=tuple(t.strip() for t in targets.split(",")),
        seed=seed,
    )
    if out is not None and adapters is not None:
        raise InvalidRequest("give --out or --adapters, not both", param="out")
    examples = read_examples(data)
    folder = adapters / name if adapters is not None else out or Path(name)
    result, shape = _train(examples, base, folder, chosen, device)
    show(result)
    if register and adapters is None:
        _register(name, folder, shape, server)


def _train(
    examples: tuple[Any, ...], base: str | None, out: Path, options: Any, device: str
) -> tuple[TrainResult, Any]:
    """The result, and the shape of the base it was trained on."""
    from adaplex_adapters.training.frozen_base import load_frozen_base
    from adaplex_adapters.training.progress import ShownProgress
    from adaplex_adapters.training.trainer import train_adapter
    from adaplex_server.bases.locate import locate_base
    from adaplex_server.model.config import read_config
    from adaplex_server.model.families import base_shape

    with ShownProgress() as progress:
        located = locate_base(base, lambda text, fraction: progress.note(text) if fraction in (0.0, 1.0) else None)
        shape = base_shape(read_config(located.folder, located.name))
        frozen = load_frozen_base(located.folder, located.name, device)
        return train_adapter(examples, frozen, out, options, progress), shape


def show(result: TrainResult) -> None:
    """What came out, as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", show_header=False)
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        shown = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(field.name.replace("_", " "), shown)
    Console(width=100).print(table)


def _register(name: str, folder: Path, shape: Any, server: str | None) -> None:
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


def register_in_folder(name: str, folder: Path, shape: Any, data_dir: Path) -> None:
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
    application.command("serve-train")(train_command)
    run(application)
