"""Goodput against offered load: what a server still does in time when more is asked than it can serve.

The capacity is found first, by a burst that keeps the server full; then requests arrive at parts and multiples of it,
in one run, so that the figures of one machine at one time are compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from adaplex_loadtest import open_loop
from adaplex_loadtest.arrivals import Arrival, Traffic, poisson
from adaplex_loadtest.load_figures import Objective, figures
from adaplex_loadtest.open_loop import Target
from adaplex_loadtest.statistics import report


async def capacity(target: Target, traffic: Traffic, burst: int) -> float:
    """Requests a second when `burst` of them are sent at once and all are served: burst should be the server's rows."""
    drawn = poisson(replace(traffic, rate=float(burst), seconds=3.0, check=0.0))[:burst]
    begun = [Arrival(0.0, one.model, one.prompt, one.output, False) for one in drawn]
    answered = await open_loop.run(target, begun)
    served = [one for one in answered if one.error is None]
    return len(served) / max((one.seconds for one in served), default=1.0)


async def sweep(
    target: Target, traffic: Traffic, objective: Objective, multiples: tuple[float, ...], burst: int
) -> list[dict[str, Any]]:
    """A line for each multiple of the capacity, and one that tells goodput at the highest beside the peak."""
    await capacity(target, traffic, burst)  # warms up
    full = await capacity(target, traffic, burst)
    lines = []
    for number, multiple in enumerate(multiples):
        offered = replace(traffic, rate=multiple * full, seed=traffic.seed + number)
        answered = await open_loop.run(target, poisson(offered))
        lines.append({"multiple": multiple, **figures(answered, traffic.seconds, objective)})
        report(benchmark="overload", **lines[-1])
    peak = max(line["goodput_per_second"] for line in lines)
    last = lines[-1]["goodput_per_second"]
    lines.append(
        {"capacity": round(full, 3), "peak": peak, "at": multiples[-1], "share": round(last / max(peak, 1e-9), 3)}
    )
    report(benchmark="overload", **lines[-1])
    return lines
