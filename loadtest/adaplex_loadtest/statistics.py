"""Percentiles and the JSON line in which every benchmark reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the values lie, by the nearest rank; NaN for none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * (len(ordered) - 1))))]


def summary(values: Sequence[float], unit_scale: float = 1000.0) -> dict[str, float]:
    """p50, p90 and p99 of seconds, in milliseconds unless scaled otherwise."""
    return {f"p{round(s * 100)}": round(percentile(values, s) * unit_scale, 2) for s in (0.5, 0.9, 0.99)}


def report(**figures: Any) -> str:
    """One JSON line; also printed, so that a benchmark can be read by a program."""
    line = json.dumps(figures)
    print(line, flush=True)
    return line
