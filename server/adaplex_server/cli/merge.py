"""`adaplex merge`: one adapter and its base as a standalone checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from adaplex_adapters.errors import NotFound
from adaplex_server.cli.demo import demo_adapters
from adaplex_server.cli.progress import StartupProgress
from adaplex_server.model.formats.quantization import BLOCK, Quantization, QuantizeKind
from adaplex_server.settings import default_data_dir

Dtype = Literal["bfloat16", "float16", "float32"]


def merge_command(
    name: Annotated[str, typer.Argument(help="The adapter: as registered in the data folder, or a demo's name.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Take the adapter from this PEFT folder, whatever its name.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, as `adaplex serve --base`.")] = None,
    quantize: Annotated[
        QuantizeKind, typer.Option(help="What a dense base is served as: its values are merged as that rounds them.")
    ] = "nf4",
    double_quant: Annotated[bool, typer.Option(help="Whether it is served with double quantization.")] = True,
    quant_block: Annotated[int, typer.Option(help="In what blocks of NF4 or FP4 it is served.")] = BLOCK,
    dtype: Annotated[Dtype, typer.Option(help="Of the result.")] = "bfloat16",
    data_dir: Annotated[Path | None, typer.Option(help="The server's data folder.", envvar="ADAPLEX_DATA_DIR")] = None,
) -> None:
    """Merge an adapter into the dequantized base, for a model that gets a machine of its own.

    The result is a dense checkpoint in Hugging Face layout that answers as the served adapter does. It is written
    under a temporary name and renamed when it is whole.

    Example:

      adaplex merge itn-en --out ./itn-en-merged
    """
    from adaplex_adapters.merging.merge import DTYPES, merge_adapter
    from adaplex_adapters.reader import read_adapter
    from adaplex_server.bases.locate import locate_base
    from adaplex_server.cli.merge_source import open_source
    from adaplex_server.model.config import read_config
    from adaplex_server.model.families import base_shape

    with StartupProgress() as progress:
        located = locate_base(base, progress.report)
        config = read_config(located.folder, located.name)
        folder = adapter or find_adapter(name, (data_dir or default_data_dir()) / located.name)
        read = read_adapter(folder, base_shape(config))
        with open_source(located.folder, config, Quantization(quantize, double_quant, quant_block)) as source:
            report = merge_adapter(source, read, located.folder, out, DTYPES[dtype], progress.report)
        progress.finish(
            f"wrote {report.out}: {report.merged} weights merged, {report.passed} tensors taken over, "
            f"{report.nbytes / 1e6:.0f} MB in {dtype}"
        )


def find_adapter(name: str, data_dir: Path) -> Path:
    """The PEFT folder behind a name: of the data folder's catalogue (also while a server holds it), or a demo
    adapter's.

    Raises NotFound with the names that are there.
    """
    from adaplex_adapters.catalogue import peek
    from adaplex_adapters.store import AdapterStore

    entries = {entry.name: entry for entry in peek(data_dir / "catalogue.sqlite3")}
    if name in entries:
        return AdapterStore(data_dir / "adapters").folder(entries[name].spec.revision)
    demos = demo_adapters()
    if name in demos:
        return demos[name]
    known = ", ".join(sorted({*entries, *demos})) or "none"
    raise NotFound(f"there is no adapter named {name!r} (there are: {known}); give its folder with --adapter")
