"""Goodput against offered load: what a server still does in time when more is asked than it can serve.

The capacity is found first, by a closed loop that keeps the server full; then requests arrive at parts and multiples of
it, in one run, so that the figures of one machine at one time are compared.

Goodput is counted in a steady window: good answers that ended in it, and their tokens. What ends after the last
arrival, when a queue runs dry, is not counted, as a server under lasting overload has no such time.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from adaplex_loadtest import open_loop
from adaplex_loadtest.answered import Answered
from adaplex_loadtest.arrivals import Traffic, poisson
from adaplex_loadtest.load_figures import Objective, figures
from adaplex_loadtest.open_loop import Target
from adaplex_loadtest.statistics import report

_WARM = 0.2
"""Share of a run that is not counted: until then the server fills."""


@dataclass(frozen=True)
class Goodput:
    """Good answers a second, and their tokens a second."""

    requests: float
    tokens: float


def goodput(answered: Sequence[Answered], seconds: float, objective: Objective) -> Goodput:
    """Of the steady window of a run whose requests arrived for so many seconds."""
    begin = _WARM * seconds
    good = [
        one
        for one in answered
        if one.within(objective.first_token, objective.per_token) and begin <= one.ended < seconds
    ]
    length = seconds - begin
    return Goodput(round(len(good) / length, 3), round(sum(one.tokens for one in good) / length, 1))


async def closed_loop(target: Target, traffic: Traffic, streams: int, seconds: float) -> list[Answered]:
    """So many clients that each ask again as soon as they are answered: what a server does that is full and no more.
    Over HTTP alone.
    """
    target = replace(target, grpc=None)
    drawn = itertools.cycle(poisson(replace(traffic, rate=1000.0, seconds=10.0, check=0.0)))
    numbers, loop = itertools.count(), asyncio.get_running_loop()
    began, answered = loop.time(), []

    async def client() -> None:
        while (at := loop.time() - began) < seconds:
            (one,) = await open_loop.run(target, [replace(next(drawn), at=0.0)], next(numbers))
            one.at = at
            answered.append(one)
            if one.error is not None:
                await asyncio.sleep(0.1)

    await asyncio.gather(*(client() for _ in range(streams)))
    return answered


async def sweep(
    target: Target, traffic: Traffic, objective: Objective, multiples: tuple[float, ...], streams: int
) -> list[dict[str, Any]]:
    """A line for the closed loop, one for each multiple of the capacity, and one that tells goodput at the last beside
    the peak of all.
    """
    await closed_loop(target, traffic, streams, traffic.seconds / 5)  # warms up
    full = await closed_loop(target, traffic, streams, traffic.seconds / 2)
    any_time = Objective(float("inf"), float("inf"))
    capacity = goodput(full, traffic.seconds / 2, any_time).requests
    lines = [_line("closed loop", full, traffic.seconds / 2, objective)]
    for number, multiple in enumerate(multiples, 1):
        offered = replace(traffic, rate=max(multiple * capacity, 0.01), seed=traffic.seed + number)
        answered = await open_loop.run(target, poisson(offered), number * 1_000_000)
        lines.append(_line(multiple, answered, traffic.seconds, objective))
    peak = {name: max(line[name] for line in lines) for name in ("goodput_per_second", "good_tokens_per_second")}
    share = {name: round(lines[-1][name] / max(most, 1e-9), 3) for name, most in peak.items()}
    lines.append(
        {
            "capacity": capacity,
            "at": multiples[-1],
            "peak": peak["goodput_per_second"],
            "peak_tokens": peak["good_tokens_per_second"],
            "share": share["goodput_per_second"],
            "share_tokens": share["good_tokens_per_second"],
        }
    )
    report(benchmark="overload", **lines[-1])
    return lines


def _line(multiple: float | str, answered: Sequence[Answered], seconds: float, objective: Objective) -> dict[str, Any]:
    steady = goodput(answered, seconds, objective)
    told = figures(answered, seconds, objective)
    told |= {"goodput_per_second": steady.requests, "good_tokens_per_second": steady.tokens}
    report(benchmark="overload", multiple=multiple, **told)
    return {"multiple": multiple, **told}
