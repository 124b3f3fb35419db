"""Concurrent streams against a running server over real HTTP: throughput, latencies and errors, as one JSON line.

A closed loop: each of the streams sends its next request when its last one ended, so the figures are those of a server
kept busy with that many streams, not of arrivals that do not wait.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson

from adaplex_loadtest.statistics import report, summary

PROMPT = "Write a long story about a lighthouse keeper, a storm and a ship that came home. "


@dataclass(frozen=True)
class Load:
    """What to ask for. models: used in turn. prompt_words repeats a sentence; answers have exactly `output_tokens`."""

    url: str
    models: tuple[str, ...]
    streams: int
    requests: int
    prompt_words: int
    output_tokens: int


@dataclass
class Measured:
    """What came back; times in seconds."""

    first_token: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)
    end_to_end: list[float] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


async def models_of(url: str) -> tuple[str, ...]:
    """Every model that the server lists."""
    async with httpx.AsyncClient(timeout=30) as client:
        answer = await client.get(f"{url}/v1/models")
        return tuple(model["id"] for model in answer.raise_for_status().json()["data"])


async def run(load: Load) -> str:
    """Send `requests` requests over `streams` connections; returns the JSON line that it printed."""
    measured = Measured()
    jobs = iter(range(load.requests))
    names = itertools.cycle(load.models)

    async def stream_after_stream() -> None:
        for number in jobs:
            await _one(load, next(names), number, measured)

    began = time.perf_counter()
    await asyncio.gather(*(stream_after_stream() for _ in range(load.streams)))
    seconds = time.perf_counter() - began
    return report(
        benchmark="serve",
        streams=load.streams,
        models=len(load.models),
        requests=load.requests,
        output_tokens=load.output_tokens,
        seconds=round(seconds, 2),
        tokens_per_second=round(measured.tokens.total() / seconds, 1),
        time_to_first_token_ms=summary(measured.first_token),
        inter_token_ms=summary(measured.between_tokens),
        end_to_end_ms=summary(measured.end_to_end),
        errors=dict(measured.errors),
    )


async def _one(load: Load, model: str, number: int, measured: Measured) -> None:
    """One request on a connection of its own, read line by line: a full HTTP client would cost more than the server."""
    address = urlsplit(load.url)
    body = orjson.dumps(_body(load, model, number))
    began = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection(address.hostname, address.port or 80)
        try:
            writer.write(
                f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                + body
            )
            status = (await reader.readline()).split()
            if status[1:2] != [b"200"]:
                measured.errors[f"HTTP {b' '.join(status[1:]).decode()}"] += 1
                return
            await _read_events(reader, model, began, measured)
        finally:
            writer.close()
    except (OSError, asyncio.IncompleteReadError) as error:
        measured.errors[type(error).__name__] += 1


async def _read_events(reader: asyncio.StreamReader, model: str, began: float, measured: Measured) -> None:
    """Lines of the chunked body that begin with "data: {"; the server writes an event in one piece."""
    last, first, finished = began, True, False
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = orjson.loads(line[6:])
        if "error" in event:
            measured.errors[str(event["error"].get("type"))] += 1
            return
        now = time.perf_counter()
        if usage := event.get("usage"):
            measured.tokens[model] += usage["completion_tokens"]
            finished = True
        elif first:
            measured.first_token.append(now - began)
            first = False
        else:
            measured.between_tokens.append(now - last)
        last = now
    if not finished:
        measured.errors["ended without usage"] += 1
    measured.end_to_end.append(last - began)


def _body(load: Load, model: str, number: int) -> dict[str, Any]:
    words = (PROMPT * (load.prompt_words // len(PROMPT.split()) + 1)).split()[: load.prompt_words]
    return {
        "model": model,
        # The number comes first, so that no two requests share a prefix and the prefix cache does not flatter.
        "prompt": f"{number}. {' '.join(words)}",
        "max_tokens": load.output_tokens,
        "min_tokens": load.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
