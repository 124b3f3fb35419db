"""`adaplex bases`: what a base would cost, without loading it, and what its formats cost in quality."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.model.formats.quantization import BLOCK, THRESHOLD, Quantization, QuantizeKind

if TYPE_CHECKING:
    from adaplex_server.bases.describe import BaseDescription

app = typer.Typer(help="Describe bases and compare their formats.", no_args_is_help=True)


@app.command("describe")
def describe(
    base: Annotated[Path, typer.Argument(help="A folder in Hugging Face layout, or a config.json alone.")],
    quantize: Annotated[QuantizeKind, typer.Option(help="How a dense checkpoint would be kept.")] = "nf4",
    double_quant: Annotated[bool, typer.Option(help="Quantize the block scales as well.")] = True,
    quant_block: Annotated[int, typer.Option(help="Parameters that share a scale in NF4 and FP4.")] = BLOCK,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of activations, keys and values.")
    ] = "auto",
    memory: Annotated[
        list[str] | None, typer.Option(help="Memory of a device, such as 48GiB; may be repeated.")
    ] = None,
    adapters: Annotated[int, typer.Option(min=0, help="How many adapters of rank 16 should fit beside it.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell a base's family, format and bits a parameter, what it takes on a GPU, and on which GPUs it fits."""
    import torch

    from adaplex_server.bases.describe import MEMORIES, describe_base, read_description_config
    from adaplex_server.engine.assembly import choose_dtype, model_bytes
    from adaplex_server.engine.memory import RUNTIME_BYTES
    from adaplex_server.engine.settings import EngineSettings, with_step_tokens

    folder, config = read_description_config(base)
    device = torch.device("cuda")
    kind = choose_dtype(dtype, config.dtype, device)
    settings = with_step_tokens(EngineSettings(base=str(folder), store="", base_name=config.name), on_gpu=True)
    step = model_bytes(settings, config, kind, device).step + RUNTIME_BYTES
    memories = tuple(_bytes(text) for text in memory) if memory else MEMORIES
    quantization = Quantization(quantize, double_quant, quant_block, THRESHOLD)
    found = describe_base(folder, config, quantization, kind, step, memories, adapters)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _print(found)


@app.command("quality")
def quality(
    folders: Annotated[list[Path], typer.Argument(help="Folders: dense ones are measured in every format.")],
    text: Annotated[
        Path | None, typer.Option(help="A text in UTF-8; Python's own documentation unless given.", exists=True)
    ] = None,
    formats: Annotated[list[str] | None, typer.Option("--format", help="Only this format; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of the text at most.")] = 2048,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a piece of the text.")] = 512,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the activations.")
    ] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to measure.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a format.")] = False,
) -> None:
    """Measure the perplexity of a text on a base in each format, with the memory that it takes."""
    from adaplex_server.bases.quality import FORMATS, measure
    from adaplex_server.engine.assembly import choose_device, choose_dtype
    from adaplex_server.model.config import read_config
    from adaplex_server.service.text_codec import TextCodec

    unknown = [name for name in formats or () if name not in FORMATS]
    if unknown:
        raise InvalidRequest(f"--format {unknown[0]} is not known; use one of {', '.join(FORMATS)}", param="format")
    words = text.read_text(encoding="utf-8") if text else _python_documentation()
    place = choose_device(device)
    table = Table("base", "format", "perplexity", "loss", "linears", "whole base")
    for folder in folders:
        config = read_config(folder)
        ids = TextCodec(folder).encode(words[: 16 * tokens])[:tokens]
        names = list(formats or FORMATS) if config.quantization is None else ["none"]
        for name in names:
            kind = choose_dtype(dtype, config.dtype, place)
            found = measure(folder, config, name, ids, min(context, config.max_context), kind, place)
            if as_json:
                print(json.dumps({"base": config.name, "perplexity": found.perplexity, **asdict(found)}), flush=True)
            sizes = _mib(found.linear_bytes), _mib(found.base_bytes)
            table.add_row(config.name, found.name, f"{found.perplexity:.3f}", f"{found.loss:.4f}", *sizes)
    if not as_json:
        Console().print(table)


def _python_documentation() -> str:
    """A long English text that is wherever Python is."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _bytes(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise InvalidRequest(f"--memory {text}: not a size such as 48GiB", param="memory") from error


def _print(found: BaseDescription) -> None:
    bits = found.format
    print(f"{found.name}: {found.family}, {found.layers} layers, {found.hidden_size} wide, {found.max_context} tokens")
    print(f"{found.parameters:,} parameters, {found.linear_parameters:,} of them in linears")
    print(f"format {bits.name}: {bits.stored:.3f} bits a linear parameter as stored, {bits.device:.3f} on a GPU")
    if bits.single is not None and bits.double is not None:
        saved = bits.single - bits.double
        gigabytes = found.linear_parameters * saved / 8e9
        print(
            f"double quantization: {bits.double:.3f} bits instead of {bits.single:.3f}, "
            f"{saved:.2f} less, which is {gigabytes:.2f} GB of this base as stored"
        )
    if found.checkpoint:
        print(f"checkpoint {_gib(found.checkpoint)}")
    print(f"on a GPU: weights {_gib(found.weights)}, steps and runtime {_gib(found.step)}")
    print(f"a token's keys and values {found.kv_token / 1024:.1f} KiB, a rank of an adapter on all linears ", end="")
    print(f"{found.adapter_rank / 1024:.1f} KiB ({found.dtype})")
    few = found.fits[0].adapters if found.fits else 0
    table = Table("memory", "fits", "left", "tokens of KV", f"beside {few} adapters of rank 16")
    for fit in found.fits:
        table.add_row(
            _gib(fit.memory),
            "yes" if fit.fits else "no",
            _gib(fit.left) if fit.left > 0 else "-",
            f"{fit.tokens:,}",
            f"{fit.tokens_beside_adapters:,}",
        )
    Console().print(table)


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB"


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"
