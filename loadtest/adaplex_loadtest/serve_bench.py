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
    limits = httpx.Limits(max_connections=load.streams, max_keepalive_connections=load.streams)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:

        async def stream_after_stream() -> None:
            for number in jobs:
                await _one(client, load, next(names), number, measured)

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


async def _one(client: httpx.AsyncClient, load: Load, model: str, number: int, measured: Measured) -> None:
    body = _body(load, model, number)
    began = last = time.perf_counter()
    first = True
    try:
        async with client.stream("POST", f"{load.url}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                measured.errors[f"HTTP {answer.status_code}"] += 1
                await answer.aread()
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = orjson.loads(line[6:])
                if "error" in event:
                    measured.errors[str(event["error"].get("type"))] += 1
                    return
                now = time.perf_counter()
                if usage := event.get("usage"):
                    measured.tokens[model] += usage["completion_tokens"]
                elif event["choices"] and first:
                    measured.first_token.append(now - began)
                    first = False
                else:
                    measured.between_tokens.append(now - last)
                last = now
        measured.end_to_end.append(last - began)
    except httpx.HTTPError as error:
        measured.errors[type(error).__name__] += 1


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
