"""Figures of a run: goodput, percentiles by model, errors by kind. Pure functions over what clients saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from adaplex_loadtest.answered import Answered
from adaplex_loadtest.statistics import summary


@dataclass(frozen=True)
class Objective:
    """A request counts as good when its first token came within `first_token` seconds, and the others with at most
    `per_token` seconds between them on average.
    """

    first_token: float
    per_token: float


def figures(answered: Sequence[Answered], seconds: float, objective: Objective) -> dict[str, Any]:
    """Of all models together. seconds: for how long requests arrived; rates are a second of it."""
    good = sum(one.within(objective.first_token, objective.per_token) for one in answered)
    refused = [one.seconds for one in answered if one.error in ("HTTP 429", "gRPC RESOURCE_EXHAUSTED")]
    return {
        "requests": len(answered),
        "seconds": round(seconds, 2),
        "offered_per_second": round(len(answered) / seconds, 3),
        "goodput_per_second": round(good / seconds, 3),
        "good": good,
        "answered": sum(one.error is None for one in answered),
        "tokens_per_second": round(sum(one.tokens for one in answered) / seconds, 1),
        **_latencies(answered),
        "refused": len(refused),
        "refusal_ms": summary(refused) if refused else None,
        "errors": dict(Counter(one.error for one in answered if one.error)),
        "sent_late_ms": summary([one.late for one in answered]) if answered else None,
    }


def by_model(answered: Sequence[Answered], objective: Objective) -> list[dict[str, Any]]:
    """A line for each model, the most asked first."""
    asked = Counter(one.model for one in answered)
    lines = []
    for model, count in asked.most_common():
        mine = [one for one in answered if one.model == model]
        good = sum(one.within(objective.first_token, objective.per_token) for one in mine)
        errors = dict(Counter(one.error for one in mine if one.error))
        lines.append({"model": model, "requests": count, "good": good, **_latencies(mine), "errors": errors})
    return lines


def _latencies(answered: Iterable[Answered]) -> dict[str, Any]:
    fine = [one for one in answered if one.error is None and one.first_token is not None]
    if not fine:
        return {}
    return {
        "time_to_first_token_ms": summary([one.first_token for one in fine if one.first_token is not None]),
        "inter_token_ms": summary([gap for one in fine for gap in one.gaps] or [0.0]),
        "per_token_ms": summary([one.per_token for one in fine]),
        "end_to_end_ms": summary([one.seconds for one in fine]),
    }
