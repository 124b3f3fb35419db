"""Hours of a server's life in minutes: mixed traffic, churn, clients that hang up, kills of the engine. Nothing leaks,
and no answer is wrong.

Rounds of traffic alternate with rest. At rest nothing runs: pages and requests must be back at zero, no more adapters
may be on the device than can be named (a revision that churn has replaced must have left its slot), and memory, the
GPU's memory and file handles are compared with the first rests after the engine last started (an allocator keeps what
it once had, so the first round is not compared with an unused server).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import linear_regression
from typing import Any

import httpx

from adaplex_loadtest import open_loop
from adaplex_loadtest.answered import WRONG, Answered
from adaplex_loadtest.arrivals import Traffic, poisson
from adaplex_loadtest.churn import Churn
from adaplex_loadtest.open_loop import Target
from adaplex_loadtest.process_watch import AT_REST_NOTHING, REGISTERED, RESIDENT, Sample, engine_of, sample
from adaplex_loadtest.statistics import report

_EXPECTED = {"hung up", "HTTP 429", "gRPC RESOURCE_EXHAUSTED", "HTTP 404", "gRPC NOT_FOUND"}
_OF_A_KILL = {"HTTP 503", "gRPC UNAVAILABLE", "service_unavailable", "unavailable", "ended early"}
_MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Plan:
    """seconds: in all. server: its process. kill_every: rounds between kills of the engine, 0 for none. rss_growth:
    bytes by which the memory of a process may grow at rest over the run, or the GPU's; handle_growth: the same of open
    files.
    """

    seconds: float
    server: int
    kill_every: int = 0
    churn_pause: float = 1.0
    rss_growth: int = 96 * _MEGABYTE
    handle_growth: int = 8


async def soak(target: Target, traffic: Traffic, churn: Churn | None, plan: Plan) -> dict[str, Any]:
    """Runs the plan; "problems" of the answer is empty when all is well. Each round is printed as a JSON line."""
    began, rounds, kills = time.monotonic(), 0, 0
    rests: list[tuple[int, Sample]] = []
    errors: Counter[str] = Counter()
    problems: list[str] = []
    asked = 0
    while time.monotonic() < began + plan.seconds:
        killing = bool(plan.kill_every) and rounds % plan.kill_every == plan.kill_every - 1
        arrivals = replace(traffic, seed=traffic.seed + rounds)
        answered = await _round(replace(target, seed=target.seed + rounds), arrivals, churn, plan, killing)
        kills += killing
        rounds += 1
        asked += len(answered)
        found = Counter(one.error for one in answered if one.error)
        errors += found
        allowed = _EXPECTED | _OF_A_KILL if killing else _EXPECTED
        problems += [f"round {rounds}: {count} times '{kind}'" for kind, count in found.items() if kind not in allowed]
        rest, left = await _rest(target.url, plan.server, began)
        problems += [f"round {rounds}: {what}" for what in left]
        rests.append((kills, rest))
        report(benchmark="soak", round=rounds, requests=len(answered), errors=dict(found), **_told(rest))
    problems += leaks(rests, plan)
    done = dict(churn.done) if churn else {}
    told: dict[str, Any] = {"rounds": rounds, "requests": asked, "kills": kills, "churn": done, "errors": dict(errors)}
    told |= _slopes(rests)
    wrong = errors[WRONG]
    report(benchmark="soak", **told, wrong_answers=wrong, problems=problems)
    return {**told, "wrong_answers": wrong, "problems": problems, "rests": [_told(rest) for _, rest in rests]}


async def _round(target: Target, traffic: Traffic, churn: Churn | None, plan: Plan, killing: bool) -> list[Answered]:
    async with contextlib.AsyncExitStack() as stack:
        if churn:
            changes = asyncio.create_task(churn.run(plan.churn_pause))
            stack.push_async_callback(_stop, changes)
        if killing:
            shot = asyncio.create_task(
                _kill(plan.server, traffic.seconds * random.Random(traffic.seed).uniform(0.3, 0.7))
            )
            stack.push_async_callback(_stop, shot)
        return await open_loop.run(target, poisson(traffic))


async def _kill(server: int, after: float) -> None:
    await asyncio.sleep(after)
    engine = engine_of(server)
    if engine is not None:
        os.kill(engine, signal.SIGKILL)


async def _stop(task: asyncio.Task[None]) -> None:
    if not task.done():
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _rest(url: str, server: int, began: float, patience: float = 60.0) -> tuple[Sample, list[str]]:
    """Wait until the server is ready and nothing runs; (figures then, what has not come back)."""
    limit = time.monotonic() + patience
    async with httpx.AsyncClient(timeout=30) as client:
        while True:
            with contextlib.suppress(httpx.TransportError, FileNotFoundError):
                ready = (await client.get(f"{url}/ready")).status_code == 200
                now = sample(url, server, round(time.monotonic() - began, 1))
                busy = not_at_rest(now.gauges)
                if ready and (not busy or time.monotonic() > limit):
                    return now, busy
            if time.monotonic() > limit + patience:
                raise TimeoutError("the server did not come to rest")
            await asyncio.sleep(0.5)


def not_at_rest(gauges: Mapping[str, float]) -> list[str]:
    """What is still held when nobody asks anything."""
    found = [f"{name} is {gauges[name]:g} at rest" for name in AT_REST_NOTHING if gauges.get(name)]
    resident, registered = gauges.get(RESIDENT, 0.0), gauges.get(REGISTERED, 0.0)
    if resident > registered:
        found.append(f"{resident:g} adapters are on the device at rest, and only {registered:g} can be named")
    return found


def leaks(rests: list[tuple[int, Sample]], plan: Plan) -> list[str]:
    """What has grown. The API process is compared over the whole run, the engine over the life of each engine; both
    from the second rest on, as the first round fills caches.
    """
    found = []
    lives = {kills: [rest for k, rest in rests if k == kills][1:] for kills in {k for k, _ in rests}}
    series = [("the API process", 0, [rest for _, rest in rests][1:])]
    series += [(f"engine {number + 1}", 1, life) for number, life in sorted(lives.items())]
    for name, which, samples in series:
        if len(samples) < 2:
            continue
        grown = _growth([s.rss[which] for s in samples])
        if grown > plan.rss_growth:
            found.append(f"{name} has grown by {grown / _MEGABYTE:.0f} MiB at rest")
        opened = _growth([s.handles[which] for s in samples])
        if opened > plan.handle_growth:
            found.append(f"{name} has {opened} file handles more at rest")
        taken = _growth([s.device for s in samples]) if which else 0
        if taken > plan.rss_growth:
            found.append(f"{name} has {taken / _MEGABYTE:.0f} MiB more of the GPU at rest")
    return found


def _growth(values: Sequence[int]) -> int:
    """The least of the last two against the most of the first two: a single peak is no leak."""
    return min(values[-2:]) - max(values[:2])


def slope(rests: Sequence[Sample], which: int) -> float | None:
    """MiB an hour by which the memory of a process grows over these rests (least squares); None for fewer than three.
    which: 0 for the API process, 1 for the engine's.
    """
    if len(rests) < 3:
        return None
    hours = [rest.at / 3600 for rest in rests]
    held = [rest.rss[which] / _MEGABYTE for rest in rests]
    return round(linear_regression(hours, held).slope, 1)


def _slopes(rests: list[tuple[int, Sample]]) -> dict[str, float | None]:
    """Of the API process over the run, and of the engine that lived longest; without the first rest of each."""
    lives = [[rest for k, rest in rests if k == kills][1:] for kills in {k for k, _ in rests}]
    return {
        "api_mib_per_hour": slope([rest for _, rest in rests][1:], 0),
        "engine_mib_per_hour": slope(max(lives, key=len, default=[]), 1),
    }


def _told(rest: Sample) -> dict[str, Any]:
    return {
        "at": rest.at,
        "rss_mib": [round(one / _MEGABYTE, 1) for one in rest.rss],
        "device_mib": round(rest.device / _MEGABYTE),
        "handles": list(rest.handles),
        **{name.removeprefix("adaplex_"): value for name, value in rest.gauges.items()},
    }
