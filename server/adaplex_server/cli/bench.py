"""`adaplex bench`: measures, and prints each figure as a JSON line."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from adaplex_adapters.errors import InvalidRequest

app = typer.Typer(help="Measure; every figure is a JSON line.", no_args_is_help=True)

Rows = Annotated[
    str, typer.Option(help="Batches to measure, as ROWS:ADAPTERS (0 adapters: the base alone), with commas.")
]
Prompt = Annotated[int, typer.Option(help="Tokens of each prompt.")]
Output = Annotated[int, typer.Option(help="Tokens of each answer.")]
Rank = Annotated[int, typer.Option(help="Rank of the random LoRA adapters, on every linear.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; all cores unless given.")]
Shape = Annotated[Literal["tiny", "135m", "1.7b", "8b"], typer.Option(help="Of the base, whose weights are random.")]
Form = Annotated[Literal["nf4", "gptq", "none"], typer.Option(help="How the weights are kept.")]
Kind = Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Of the activations.")]
Where = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the base lives.")]


@app.command()
def engine(
    shape: Annotated[
        Literal["tiny", "135m", "1.7b", "8b", "embedded"],
        typer.Option(help="Random weights, or 'embedded' for the real base."),
    ] = "135m",
    format: Annotated[
        Literal["nf4", "gptq", "none"], typer.Option(help="Of random weights; the embedded base is NF4.")
    ] = "nf4",
    batches: Rows = "1:0,8:0,8:4",
    prompt: Prompt = 32,
    output: Output = 64,
    rank: Rank = 8,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Of the activations.")] = "bfloat16",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the base lives.")] = "auto",
    threads: Threads = None,
    page_size: Annotated[int, typer.Option(help="Tokens in a KV page.")] = 16,
    step_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step at most; the engine's own choice unless given.")
    ] = None,
    graphs: Annotated[bool, typer.Option(help="Replay decode steps as CUDA graphs (on a GPU).")] = True,
    overlap: Annotated[
        bool, typer.Option(help="Launch a step before the host knows what the one before chose (on a GPU).")
    ] = True,
    repeats: Annotated[int, typer.Option(help="Times that each batch is run.")] = 3,
    kinds: Annotated[
        str | None,
        typer.Option(
            help="Beside the LoRAs, batches of other kinds, and the ratio: 'all', or some as lora+dora; with commas."
        ),
    ] = None,
) -> None:
    """The engine alone: time of prefill and of a decode step."""
    import torch

    from adaplex_loadtest import engine_bench, kinds_bench, random_kinds, shapes
    from adaplex_server.bases.embedded import ensure_embedded
    from adaplex_server.engine.assembly import choose_device
    from adaplex_server.model.base import load_base
    from adaplex_server.model.config import read_config
    from adaplex_server.model.random_base import random_base

    place, kind = choose_device(device), getattr(torch, dtype)
    measured = [engine_bench.Batch(r, k, prompt, output) for r, k in _batches(batches)]
    sets = random_kinds.parse_kinds(kinds) if kinds else []
    if sets and not all(batch.adapters for batch in measured):
        raise InvalidRequest("kinds are measured in batches with adapters, such as --batches 64:64")
    if shape == "embedded":
        folder = ensure_embedded()
        config = read_config(folder)
        base = load_base(folder, config=config, quantize="nf4", double_quant=True, dtype=kind, device=place)
    else:
        base = random_base(shapes.shape_config(shape), format, dtype=kind, device=place)
    with tempfile.TemporaryDirectory() as store:
        settings = engine_bench.settings_for(
            measured,
            rank,
            Path(store),
            threads=threads,
            page_size=page_size,
            step_tokens=step_tokens,
            graphs=graphs,
            overlap=overlap,
        )
        if sets:
            kinds_bench.bench(base, settings, measured, sets, rank, repeats)
        else:
            engine_bench.bench(base, settings, measured, rank, repeats)


@app.command()
def kernels(
    shape: Shape = "8b",
    format: Form = "nf4",
    rows: Annotated[str, typer.Option(help="Rows of the batches, with commas.")] = "1,8,16,32,64,128",
    adapters: Annotated[str, typer.Option(help="Different adapters in a batch, with commas.")] = "1,8,64",
    rank: Rank = 16,
    contexts: Annotated[str, typer.Option(help="Tokens that attention sees, with commas.")] = "577,4096",
    dtype: Kind = "bfloat16",
    device: Where = "auto",
) -> None:
    """Each kernel of a decode step, beside the time that its bytes take."""
    from adaplex_loadtest import kernel_bench

    load = kernel_bench.KernelLoad(_numbers(rows), _numbers(adapters), rank, _numbers(contexts))
    kernel_bench.bench(_random_base(shape, format, dtype, device), load)


@app.command()
def profile(
    shape: Shape = "8b",
    format: Form = "nf4",
    batches: Rows = "64:64",
    prompt: Prompt = 512,
    rank: Rank = 16,
    steps: Annotated[int, typer.Option(help="Steps to look at.")] = 32,
    kernels: Annotated[int, typer.Option(help="Kernels to list, the costliest first.")] = 30,
    dtype: Kind = "bfloat16",
    device: Where = "auto",
    threads: Threads = None,
) -> None:
    """Where the microseconds of a decode step go: kernels by name, gaps, and the host."""
    from adaplex_loadtest import engine_bench, profile_bench

    measured = [engine_bench.Batch(r, k, prompt, 4 * steps + 16) for r, k in _batches(batches)]
    with tempfile.TemporaryDirectory() as store:
        settings = engine_bench.settings_for(measured, rank, Path(store), threads=threads, page_size=16)
        profile_bench.bench(_random_base(shape, format, dtype, device), settings, measured, rank, steps, kernels)


@app.command()
def swap(
    shape: Shape = "8b",
    format: Form = "nf4",
    rank: Rank = 16,
    rows: Annotated[int, typer.Option(help="Rows that run while adapters come and go.")] = 32,
    adapters: Annotated[int, typer.Option(help="Adapters of those rows.")] = 8,
    swaps: Annotated[float, typer.Option(help="Adapters that come, a second.")] = 20.0,
    seconds: Annotated[float, typer.Option(help="How long each kind of coming is measured.")] = 4.0,
    contents: Annotated[int, typer.Option(help="Adapters on disk.")] = 24,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 64,
    output: Output = 64,
    registered: Annotated[int, typer.Option(help="Adapters of the Zipf traffic.")] = 1000,
    slots: Annotated[int, typer.Option(help="Adapters on the device, and rows, of the Zipf traffic.")] = 64,
    requests: Annotated[int, typer.Option(help="Requests of the Zipf traffic.")] = 512,
    folder: Annotated[Path | None, typer.Option(help="For the adapters; a temporary one unless given.")] = None,
    dtype: Kind = "bfloat16",
    device: Where = "auto",
    threads: Threads = None,
) -> None:
    """Adapters that come and go: cold ones, swaps beside running rows, and Zipf traffic over more than fit."""
    from adaplex_loadtest import swap_bench

    load = swap_bench.SwapLoad(
        rank, rows, adapters, swaps, seconds, contents, prompt, output, registered, slots, requests
    )
    with tempfile.TemporaryDirectory(dir=folder) as store:
        swap_bench.bench(_random_base(shape, format, dtype, device), load, Path(store), threads)


@app.command()
def train(
    shape: Annotated[
        Literal["tiny", "135m", "1.7b", "8b", "65b"], typer.Option(help="Of the base, whose NF4 weights are random.")
    ] = "8b",
    batches: Annotated[
        str, typer.Option(help="Micro-batches, as ROWSxTOKENS, with commas; none with 'none'.")
    ] = "1x512,1x2048,4x2048",
    checkpointing: Annotated[Literal["on", "off", "both"], typer.Option(help="Of activations.")] = "both",
    peft: Annotated[bool, typer.Option(help="Measure plain PEFT with bitsandbytes first.")] = True,
    together: Annotated[
        str | None, typer.Option(help="Tokens of a row of each of several adapters trained together, with commas.")
    ] = None,
    adapters: Annotated[int, typer.Option(help="Adapters trained together.")] = 8,
    rank: Rank = 16,
    seconds: Annotated[float, typer.Option(help="Of each measurement, about.")] = 2.0,
    device: Where = "auto",
) -> None:
    """QLoRA by this trainer and by PEFT, and adapters trained together against one after the other."""
    from adaplex_adapters.training.frozen_base import training_device
    from adaplex_loadtest import random_training_base, together_bench, train_bench

    settings = {"on": (True,), "off": (False,), "both": (True, False)}[checkpointing]
    wanted = () if batches == "none" else tuple(_rows_and_tokens(batches))
    contenders = (train_bench.THEIRS, train_bench.OURS) if peft else (train_bench.OURS,)
    base = random_training_base.random_base(shape, training_device(device))
    train_bench.bench(base, train_bench.TrainLoad(wanted, settings, rank, seconds, contenders))
    for length in _numbers(together) if together else ():
        for setting in settings:
            together_bench.bench_together(base, adapters, length, rank, setting)


@app.command()
def serve(
    url: Annotated[str, typer.Option(help="The running server.")] = "http://127.0.0.1:8000",
    models: Annotated[str | None, typer.Option(help="Models, with commas; all of the server unless given.")] = None,
    streams: Annotated[int, typer.Option(help="Streams at once.")] = 64,
    requests: Annotated[int, typer.Option(help="Requests in all.")] = 128,
    prompt: Annotated[int, typer.Option(help="Words of each prompt.")] = 32,
    output: Output = 64,
) -> None:
    """A running server over real HTTP, streaming."""
    from adaplex_loadtest import serve_bench

    async def measure() -> None:
        names = tuple(models.split(",")) if models else await serve_bench.models_of(url)
        await serve_bench.run(serve_bench.Load(url, names, streams, requests, prompt, output))

    asyncio.run(measure())


@app.command()
def peft(
    batches: Rows = "1:0,8:4",
    prompt: Prompt = 32,
    output: Output = 64,
    rank: Rank = 8,
    threads: Threads = None,
    repeats: Annotated[int, typer.Option(help="Times that each side is run, in turn; the best counts.")] = 3,
) -> None:
    """The same work by transformers and PEFT and by the engine, in one run, with the ratio."""
    from adaplex_loadtest import compare_bench

    compare_bench.compare(_batches(batches), prompt, output, rank, threads, repeats)


@app.command()
def checkpoint(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    shape: Annotated[Literal["135m", "1.7b", "8b"], typer.Option(help="As of SmolLM2 and Llama 3.1.")] = "8b",
    format: Annotated[Literal["nf4", "gptq"], typer.Option(help="How its weights are quantized.")] = "gptq",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with a tokenizer; the embedded base's unless given.")
    ] = None,
) -> None:
    """Write a base with random weights, to measure a whole server at a shape that is not at hand."""
    from adaplex_loadtest import random_checkpoint
    from adaplex_server.bases.embedded import ensure_embedded

    source = tokenizer or ensure_embedded()
    random_checkpoint.write_random_checkpoint(out, shape, format, source)


def _random_base(shape: str, format: str, dtype: str, device: str) -> Any:
    import torch

    from adaplex_loadtest.shapes import shape_config
    from adaplex_server.engine.assembly import choose_device
    from adaplex_server.model.random_base import random_base

    form: Any = format
    return random_base(shape_config(shape), form, dtype=getattr(torch, dtype), device=choose_device(device))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
        if min(found) < 1:
            raise ValueError
    except ValueError:
        raise InvalidRequest(f"{json.dumps(text)} is not a list of numbers such as 1,8,64") from None
    return found


def _batches(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [tuple(int(number) for number in part.split(":")) for part in text.split(",")]
        if any(len(pair) != 2 or pair[0] < 1 or not 0 <= pair[1] <= pair[0] for pair in pairs):
            raise ValueError
    except ValueError:
        raise InvalidRequest(f"{json.dumps(text)} is not a list of ROWS:ADAPTERS such as 1:0,8:4") from None
    return [(pair[0], pair[1]) for pair in pairs]


def _rows_and_tokens(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [tuple(int(number) for number in part.split("x")) for part in text.split(",")]
        if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
            raise ValueError
    except ValueError:
        raise InvalidRequest(f"{json.dumps(text)} is not a list of ROWSxTOKENS such as 1x512,4x2048") from None
    return [(pair[0], pair[1]) for pair in pairs]
