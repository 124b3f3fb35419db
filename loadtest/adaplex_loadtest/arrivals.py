"""When requests arrive, for which model, and how long they are: a schedule made before the first one is sent."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaplex_adapters.errors import InvalidRequest


@dataclass(frozen=True)
class Arrival:
    """at: seconds after the start. prompt: words. output: tokens, exactly. check: a question whose answer is known is
    asked instead, and the answer compared.
    """

    at: float
    model: str
    prompt: int
    output: int
    check: bool


@dataclass(frozen=True)
class Lengths:
    """A log-normal distribution around `median` (its spread `sigma` of the logarithm; 0 for always the median), cut to
    1 .. 16 * median.
    """

    median: int
    sigma: float = 0.0

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return min(16 * self.median, max(1, round(self.median * math.exp(rng.gauss(0, self.sigma)))))


@dataclass(frozen=True)
class Traffic:
    """rate: requests a second, as a Poisson process. zipf: the k-th model is asked for with weight k**-zipf; 0 for all
    alike. check: share of requests that are checked.
    """

    models: tuple[str, ...]
    rate: float
    seconds: float
    prompt: Lengths
    output: Lengths
    zipf: float = 1.0
    check: float = 0.25
    seed: int = 0


def zipf_weights(count: int, exponent: float) -> list[float]:
    """Chances of ranks 1 .. count, which sum to 1."""
    weights = [rank**-exponent for rank in range(1, count + 1)]
    return [weight / sum(weights) for weight in weights]


def poisson(traffic: Traffic) -> list[Arrival]:
    """Independent arrivals: exponential gaps."""
    rng = random.Random(traffic.seed)
    weights = zipf_weights(len(traffic.models), traffic.zipf)
    arrivals: list[Arrival] = []
    at = rng.expovariate(traffic.rate)
    while at < traffic.seconds:
        (model,) = rng.choices(traffic.models, weights)
        check = rng.random() < traffic.check
        arrivals.append(Arrival(at, model, traffic.prompt.draw(rng), traffic.output.draw(rng), check))
        at += rng.expovariate(traffic.rate)
    return arrivals


def read_trace(path: Path, models: Sequence[str]) -> list[Arrival]:
    """A JSON line for each arrival: {"at": 0.5, "model": "itn-en", "prompt": 32, "output": 64, "check": false}. model:
    a name, or a number that counts through `models`. Sorted by time. Raises InvalidRequest naming the line.
    """
    arrivals = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
            model = told["model"]
            name = models[model % len(models)] if isinstance(model, int) else str(model)
            check = bool(told.get("check", False))
            arrivals.append(Arrival(float(told["at"]), name, int(told["prompt"]), int(told["output"]), check))
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidRequest(f"{path}:{number} is no arrival: {error!r}; see --help for its fields") from error
    return sorted(arrivals, key=lambda arrival: arrival.at)
