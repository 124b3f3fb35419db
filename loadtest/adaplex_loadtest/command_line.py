"""The commands of `python -m adaplex_loadtest`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from adaplex_adapters.errors import InvalidRequest
from adaplex_loadtest import open_loop, overload, questions, serve_bench, soak
from adaplex_loadtest.answered import WRONG
from adaplex_loadtest.arrivals import Lengths, Traffic, poisson, read_trace
from adaplex_loadtest.churn import Churn
from adaplex_loadtest.html_report import page, plot, plots_of_run
from adaplex_loadtest.load_figures import Objective, by_model, figures
from adaplex_loadtest.open_loop import Target
from adaplex_loadtest.statistics import report
from adaplex_server.cli.demo import demo_adapters
from adaplex_server.cli.run import run as run_application

app = typer.Typer(
    help="Open-loop load on a running server: requests are sent when they are due, whatever became of those before.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Url = Annotated[str, typer.Option(help="The running server.")]
Grpc = Annotated[str | None, typer.Option(help="HOST:PORT: every second request goes over gRPC.")]
Models = Annotated[
    str | None, typer.Option(help="Models with commas, the most popular first; all of the server unless given.")
]
Rate = Annotated[float, typer.Option(help="Requests a second, as a Poisson process.")]
Seconds = Annotated[float, typer.Option(help="For how long requests arrive.")]
Zipf = Annotated[float, typer.Option(help="Exponent of the models' popularity; 0 for all alike.")]
PromptWords = Annotated[int, typer.Option(help="Words of a prompt, the median.")]
OutputTokens = Annotated[int, typer.Option(help="Tokens of an answer, the median.")]
Spread = Annotated[float, typer.Option(help="Spread of both lengths (sigma of a log-normal); 0 for none.")]
Check = Annotated[float, typer.Option(help="Share of requests whose greedy answers must be those given alone.")]
First = Annotated[float, typer.Option(help="Seconds to the first token within which a request counts as good.")]
Between = Annotated[float, typer.Option(help="Mean seconds between its tokens within which it does.")]
Timeout = Annotated[float | None, typer.Option(help="Sent with each request: seconds after which it is worthless.")]
Report = Annotated[Path | None, typer.Option(help="HTML file to write.")]
Seed = Annotated[int, typer.Option(help="Of everything random here.")]
ChurnEvery = Annotated[float, typer.Option(help="Mean seconds between uploads of adapters meanwhile; 0 for none.")]
ChurnFolders = Annotated[str | None, typer.Option(help="PEFT folders to upload, with commas; the demo's unless given.")]


@app.command()
def run(
    url: Url = "http://127.0.0.1:8000",
    grpc: Grpc = None,
    models: Models = None,
    rate: Rate = 4.0,
    seconds: Seconds = 30.0,
    trace: Annotated[
        Path | None, typer.Option(help="JSON lines of arrivals, instead of rate, zipf and lengths.")
    ] = None,
    zipf: Zipf = 1.0,
    prompt: PromptWords = 32,
    output: OutputTokens = 32,
    spread: Spread = 0.5,
    check: Check = 0.25,
    churn_every: ChurnEvery = 0.0,
    churn_folders: ChurnFolders = None,
    first_token: First = 2.0,
    per_token: Between = 0.2,
    timeout: Timeout = None,
    html: Report = None,
    seed: Seed = 0,
) -> None:
    """Requests by a Poisson process or a trace; goodput, percentiles by model, errors; answers are checked.

    Ends with 1 if an answer was wrong. A trace's lines are such as
    {"at": 0.5, "model": "itn-en", "prompt": 32, "output": 64, "check": false}; a number for a model counts through
    --models.
    """
    objective = Objective(first_token, per_token)

    async def load() -> bool:
        churn = _churn(url, churn_folders, seed) if churn_every else None
        traffic = await _traffic(
            url,
            models,
            churn,
            Traffic((), rate, seconds, Lengths(prompt, spread), Lengths(output, spread), zipf, check, seed),
        )
        arrivals = read_trace(trace, traffic.models) if trace else poisson(traffic)
        asked = tuple(dict.fromkeys(one.model for one in arrivals if one.check))
        target = Target(url, grpc, await questions.record(url, asked), timeout, seed=seed)
        changes = asyncio.create_task(churn.run(churn_every)) if churn else None
        answered = await open_loop.run(target, arrivals)
        if churn and changes:
            changes.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await changes
            await churn.clear()
        told = figures(answered, max(seconds if not trace else 0.0, answered[-1].at if answered else 1.0), objective)
        told |= {"checked_against": len(target.answers), "churn": dict(churn.done) if churn else {}}
        lines = by_model(answered, objective)
        report(benchmark="open loop", **told)
        for line in lines:
            report(benchmark="open loop, by model", **line)
        if html:
            html.write_text(page("Load test", told, lines, plots_of_run(answered)), encoding="utf-8")
        return told["errors"].get(WRONG, 0) == 0

    _finish(load())


@app.command("overload")
def overload_command(
    url: Url = "http://127.0.0.1:8000",
    grpc: Grpc = None,
    models: Models = None,
    seconds: Seconds = 20.0,
    multiples: Annotated[str, typer.Option(help="Of the capacity, with commas, the highest last.")] = "0.5,0.8,1,2",
    streams: Annotated[int, typer.Option(help="Clients of the closed loop that measures the capacity.")] = 64,
    zipf: Zipf = 1.0,
    prompt: PromptWords = 16,
    output: OutputTokens = 32,
    first_token: First = 5.0,
    per_token: Between = 0.5,
    timeout: Timeout = None,
    least: Annotated[float, typer.Option(help="Share of the peak goodput that must be left at the highest.")] = 0.9,
    html: Report = None,
    seed: Seed = 0,
) -> None:
    """Goodput when more is asked than can be served, beside its peak. Ends with 1 if it falls below --least of it."""

    async def load() -> bool:
        traffic = await _traffic(
            url, models, None, Traffic((), 1.0, seconds, Lengths(prompt), Lengths(output), zipf, 0.0, seed)
        )
        steps = tuple(float(part) for part in multiples.split(","))
        lines = await overload.sweep(
            Target(url, grpc, timeout=timeout), traffic, Objective(first_token, per_token), steps, streams
        )
        if html:
            curve = {
                name: [(line["offered_per_second"], line[name]) for line in lines[1:-1]]
                for name in ("goodput_per_second", "offered_per_second")
            }
            html.write_text(
                page("Overload", lines[-1], [], [plot("Requests a second, by those offered", curve)]), encoding="utf-8"
            )
        return bool(lines[-1]["share"] >= least)

    _finish(load())


@app.command("soak")
def soak_command(
    pid: Annotated[int, typer.Option(help="Process of the server (not of its engine), to watch.")],
    url: Url = "http://127.0.0.1:8000",
    grpc: Grpc = None,
    models: Models = None,
    minutes: Annotated[float, typer.Option(help="In all.")] = 30.0,
    rate: Rate = 3.0,
    seconds: Seconds = 20.0,
    zipf: Zipf = 0.7,
    prompt: PromptWords = 24,
    output: OutputTokens = 24,
    check: Check = 0.5,
    hang_ups: Annotated[float, typer.Option(help="Share of clients that go away in the middle.")] = 0.15,
    kill_every: Annotated[int, typer.Option(help="Rounds between kills (SIGKILL) of the engine; 0 for none.")] = 0,
    churn_every: ChurnEvery = 2.0,
    churn_folders: ChurnFolders = None,
    seed: Seed = 0,
) -> None:
    """Rounds of traffic, churn, hang-ups and kills with rests between; ends with 1 on a leak or a wrong answer."""

    async def load() -> bool:
        churn = _churn(url, churn_folders, seed) if churn_every else None
        traffic = await _traffic(
            url,
            models,
            churn,
            Traffic((), rate, seconds, Lengths(prompt, 0.5), Lengths(output, 0.5), zipf, check, seed),
        )
        target = Target(url, grpc, await questions.record(url, traffic.models), hang_ups=hang_ups, seed=seed)
        told = await soak.soak(target, traffic, churn, soak.Plan(60 * minutes, pid, kill_every, churn_every or 1.0))
        if churn:
            await churn.clear()
        return not told["problems"]

    _finish(load())


def _churn(url: str, folders: str | None, seed: int) -> Churn:
    chosen = {Path(part).name: Path(part) for part in folders.split(",")} if folders else demo_adapters()
    if not chosen:
        raise InvalidRequest("there are no adapters to upload: name some with --churn-folders")
    return Churn(url, chosen, seed)


async def _traffic(url: str, models: str | None, churn: Churn | None, traffic: Traffic) -> Traffic:
    """The traffic with its models: those named, or all of the server; and what comes and goes, last."""
    names = tuple(models.split(",")) if models else await serve_bench.models_of(url)
    if churn:
        await churn.load_all()
        names = (*(name for name in names if name not in churn.names), *churn.names)
    return replace(traffic, models=names)


def _finish(work: Coroutine[Any, Any, bool]) -> None:
    if not asyncio.run(work):
        raise typer.Exit(1)


def main() -> None:
    """The entry point."""
    run_application(app)
