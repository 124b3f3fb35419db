"""Sends requests when they are due, whatever became of those before, and gathers what became of them.

A closed loop hides latency under overload: its clients wait instead of asking. Here each arrival is a task of its own,
and how much later than due it was sent is reported: if that is not small, the generator is the bottleneck.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from adaplex_loadtest import grpc_stream, http_stream
from adaplex_loadtest.answered import WRONG, Answered
from adaplex_loadtest.arrivals import Arrival
from adaplex_loadtest.questions import chat_body, filler, questions_for


@dataclass(frozen=True)
class Target:
    """url: of HTTP. grpc: HOST:PORT, None for HTTP alone; otherwise every second request goes there. answers: of
    `questions.record`; what is asked for that is not in it is not checked. timeout: sent with every request. hang_ups:
    share of clients that go away in the middle.
    """

    url: str
    grpc: str | None = None
    answers: dict[tuple[str, str], str] = field(default_factory=dict)
    timeout: float | None = None
    hang_ups: float = 0.0
    seed: int = 0


async def run(target: Target, arrivals: Sequence[Arrival], first: int = 0) -> list[Answered]:
    """All of them, in the order of the arrivals; returns when the last has ended. first: the first one's number, by
    which prompts differ, and which protocol comes first.
    """
    loop, rng = asyncio.get_running_loop(), random.Random(target.seed)
    protocols = ("http", "grpc") if target.grpc else ("http",)
    channel = grpc.aio.insecure_channel(target.grpc) if target.grpc else None
    began = loop.time()
    tasks = []
    for number, arrival in enumerate(arrivals, first):
        await asyncio.sleep(max(0.0, began + arrival.at - loop.time()))
        told = Answered(arrival.at, arrival.model, protocols[number % len(protocols)])  # type: ignore[arg-type]
        told.late = max(0.0, loop.time() - began - arrival.at)
        hang_up = rng.uniform(0.05, 1.5) if rng.random() < target.hang_ups else None
        tasks.append(asyncio.create_task(_one(target, channel, arrival, number, told, hang_up)))
    answered = await asyncio.gather(*tasks)
    if channel:
        await channel.close()
    return answered


async def _one(
    target: Target,
    channel: grpc.aio.Channel | None,
    arrival: Arrival,
    number: int,
    told: Answered,
    hang_up: float | None,
) -> Answered:
    questions = questions_for(arrival.model)
    question = questions[number % len(questions)]
    known = target.answers.get((arrival.model, question)) if arrival.check else None
    body = _sized(arrival, number) if known is None else chat_body(arrival.model, question)
    if told.over == "grpc":
        assert channel is not None
        await grpc_stream.stream(channel, body, told, target.timeout, hang_up)
    else:
        path = "/v1/completions" if known is None else "/v1/chat/completions"
        await http_stream.stream(target.url, path, body, told, target.timeout, hang_up)
    if known is not None and told.error is None and told.text != known:
        told.error = WRONG
    return told


def _sized(arrival: Arrival, number: int) -> dict[str, Any]:
    return {
        "model": arrival.model,
        "prompt": filler(number, arrival.prompt),
        "max_tokens": arrival.output,
        "min_tokens": arrival.output,
        "ignore_eos": True,
        "temperature": 0,
    }
