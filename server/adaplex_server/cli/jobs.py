"""`adaplex jobs`: fine-tuning jobs of a running server, from a JSONL file to a served adapter."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.cli.remote import DEFAULT_SERVER, Server, call, key_header

app = typer.Typer(help="Train adapters on a running server.", no_args_is_help=True)
_JOBS = "/v1/fine_tuning/jobs"


@app.command("create")
def create(
    data: Annotated[Path, typer.Argument(help="JSONL: chats with 'messages', or rows with 'prompt' and 'completion'.")],
    name: Annotated[str, typer.Option(help="What clients will call the adapter.")],
    validation: Annotated[
        Path | None, typer.Option(help="Rows to measure with; some of the data unless given.")
    ] = None,
    option: Annotated[
        list[str],
        typer.Option("--option", "-o", metavar="NAME=VALUE", help="Of the trainer, as `serve-train` has them."),
    ] = [],  # noqa: B006 (typer copies it)
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    register_worse: Annotated[
        bool, typer.Option(help="Serve the result even if it is no better than the base.")
    ] = False,
    watch: Annotated[bool, typer.Option(help="Stay, and tell what the job tells.")] = True,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Upload the data and train an adapter on them."""
    base = call(server, "GET", "/v1/models")["data"][0]["root"]
    wanted: dict[str, Any] = {
        "model": base,
        "training_file": _upload(server, data),
        "suffix": name,
        "hyperparameters": dict(_option(one) for one in option),
        "register_worse": register_worse,
    }
    if validation is not None:
        wanted["validation_file"] = _upload(server, validation)
    if seed is not None:
        wanted["seed"] = seed
    job = call(server, "POST", _JOBS, json=wanted)
    print(job["id"])
    if watch:
        _watch(server, job["id"])


@app.command("list")
def list_jobs(server: Server = DEFAULT_SERVER) -> None:
    """Show the jobs, the newest first."""
    table = Table("id", "adapter", "status", "tokens", "created", "error")
    for job in call(server, "GET", _JOBS, params={"limit": 100})["data"]:
        error = job["error"]["message"] if job["error"] else ""
        created = datetime.fromtimestamp(job["created_at"]).isoformat(" ")
        table.add_row(job["id"], job["adapter"], job["status"], str(job["trained_tokens"] or "-"), created, error)
    Console().print(table)


@app.command("watch")
def watch(job_id: str, server: Server = DEFAULT_SERVER) -> None:
    """Tell what a job has told and tells, until it has ended or is paused."""
    _watch(server, job_id)


@app.command("cancel")
def cancel(job_id: str, server: Server = DEFAULT_SERVER) -> None:
    """End a job and forget what it has made."""
    _change(server, job_id, "cancel")


@app.command("pause")
def pause(job_id: str, server: Server = DEFAULT_SERVER) -> None:
    """Have a job keep a checkpoint and wait."""
    _change(server, job_id, "pause")


@app.command("resume")
def resume(job_id: str, server: Server = DEFAULT_SERVER) -> None:
    """Queue a paused job again."""
    _change(server, job_id, "resume")


def _change(server: str, job_id: str, what: str) -> None:
    print(call(server, "POST", f"{_JOBS}/{job_id}/{what}")["status"])


def _upload(server: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            parts = {"purpose": (None, "fine-tune"), "file": (path.name, file)}
            return str(call(server, "POST", "/v1/files", files=parts)["id"])
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error


def _option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON where it is some."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidRequest(f"--option is {text!r}; write it as NAME=VALUE", param="option")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _watch(server: str, job_id: str) -> None:
    url = f"{server}{_JOBS}/{job_id}/events"
    with httpx.stream("GET", url, params={"stream": "true"}, headers=key_header(), timeout=None) as answer:
        if answer.is_error:
            call(server, "GET", f"{_JOBS}/{job_id}")  # raises with the server's words
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                _tell(json.loads(line.removeprefix("data: ")))
    job = call(server, "GET", f"{_JOBS}/{job_id}")
    print(f"{job['status']}: {job['fine_tuned_model'] or (job['error'] or {}).get('message', 'nothing is served')}")


def _tell(event: dict[str, Any]) -> None:
    data = event["data"]
    figures = [f"{name} {data[name]:.4g}" for name in ("loss", "tokens_per_second", "seconds_left") if data.get(name)]
    print("  ".join([event["message"], *figures]), flush=True)
