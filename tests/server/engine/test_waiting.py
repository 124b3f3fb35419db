"""Turns between adapters: what each gets of a busy engine, simulated with rows of random cost."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from adaplex_server.engine.row import Row
from adaplex_server.engine.waiting import WaitingRows
from adaplex_server.vocabulary import SamplingParams

PLACES = 8
PROMPT, ANSWER = 200, 60


def make_row(number: int, revision: str | None, prompt: int = 1, answer: int = 1, **more: float) -> Row:
    priority, weight = int(more.get("priority", 0)), more.get("weight", 1.0)
    sampling = SamplingParams(max_tokens=answer)
    return Row(number, [0] * prompt, prompt, sampling, revision, None, priority, number, answer, weight=weight)


class Simulation:
    """An engine of `PLACES` rows, each of which takes one token a step after its prompt."""

    def __init__(self) -> None:
        self.queue = WaitingRows()
        self.running: dict[Row, int] = {}
        self.service: Counter[str | None] = Counter()
        self.began: list[Row] = []

    def add(self, row: Row) -> None:
        self.queue.add(row)
        row.state = "waiting"

    def step(self) -> None:
        while len(self.running) < PLACES and (priorities := self.queue.priorities()):
            row = self.queue.next(priorities[0], lambda revision: True)
            assert row is not None
            self.queue.served(row, row.prompt_length)
            row.state = "running"
            self.running[row] = row.max_tokens
            self.service[row.revision] += row.prompt_length
            self.began.append(row)
        for row in list(self.running):
            self.queue.charge(row, 1)
            self.service[row.revision] += 1
            self.running[row] -= 1
            if not self.running[row]:
                del self.running[row]
                self.queue.leave(row)
        self.queue.check_integrity()


def backlog(weights: dict[str, float], seed: int, steps: int) -> dict[str, float]:
    """The service by weight of adapters that always have rows waiting, whose rows are unlike each other's."""
    rng, world, number = random.Random(seed), Simulation(), 0
    sizes = {name: (rng.randint(1, PROMPT), rng.randint(1, ANSWER)) for name in weights}
    for _ in range(steps):
        for name, weight in weights.items():
            while sum(row.revision == name for row in world.queue) < PLACES:
                prompt, answer = (rng.randint(1, most) for most in sizes[name])
                world.add(make_row(number, name, prompt, answer, weight=weight))
                number += 1
        world.step()
    return {name: world.service[name] / weights[name] for name in weights}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [40, 400])
def test_adapters_that_always_wait_get_the_same_service(seed: int, steps: int) -> None:
    """The difference is bounded by what rows under way may still take, however long it goes on."""
    service = backlog({"a": 1, "b": 1, "c": 1}, seed, steps)
    assert max(service.values()) - min(service.values()) <= 2 * (PROMPT + PLACES * ANSWER)


def test_service_is_in_proportion_to_the_weights() -> None:
    weights = {"a": 1.0, "b": 3.0, "c": 0.5}
    service = backlog(weights, seed=7, steps=3000)
    assert max(service.values()) - min(service.values()) <= 2 * (PROMPT + PLACES * ANSWER) / min(weights.values())
    assert service["b"] * 3 > 2 * service["a"]


def test_a_flood_does_not_hold_up_another_adapter() -> None:
    """50 wait and 8 run; the newcomer is the next to begin, and its second row does not wait for the flood either."""
    world = Simulation()
    for number in range(58):
        world.add(make_row(number, "flood", 5, 20))
    world.step()
    world.add(make_row(100, "other", 5, 20))
    world.add(make_row(101, "other", 5, 20))
    for _ in range(20):
        world.step()
    assert [row.revision for row in world.began[8:11]] == ["other", "other", "flood"]


def test_one_that_was_served_meanwhile_does_not_pay_twice() -> None:
    """Rounds that let one adapter go on pay off what another one's running rows take, too."""
    world = Simulation()
    world.add(make_row(0, "quiet", 1, 200))
    for number in range(1, 200):
        world.add(make_row(number, "busy", 1, 10))
    for _ in range(100):
        world.step()
    world.add(make_row(500, "quiet", 1, 1))
    begun = len(world.began)
    for _ in range(10):
        world.step()
    assert 500 in [row.id for row in world.began[begun : begun + PLACES]]


def test_priorities_come_first_and_fairness_within_them() -> None:
    world = Simulation()
    for number in range(20):
        world.add(make_row(number, "a", 3, 5))
    world.add(make_row(50, "b", 3, 5))
    world.add(make_row(60, "b", 3, 5, priority=-1))
    world.add(make_row(70, None, 3, 5, priority=1))
    for _ in range(40):
        world.step()
    order = [row.id for row in world.began]
    assert order[0] == 60 and order[-1] == 70 and order.index(50) <= 2


def test_how_many_are_ahead_counts_turns() -> None:
    queue = WaitingRows()
    for number in range(10):
        queue.add(make_row(number, "a"))
    queue.add(make_row(20, "c", priority=-1))
    assert queue.ahead(make_row(30, "b")) == 2, "one of a's, and the urgent one"
    assert queue.ahead(make_row(31, "a")) == 11
    assert queue.ahead(make_row(32, "c", priority=-1)) == 1


def test_an_account_lasts_as_long_as_its_rows() -> None:
    queue, row = WaitingRows(), make_row(0, "a", 40)
    queue.add(row)
    row.state = "waiting"
    queue.served(row, 40)
    row.state = "running"
    queue.add(make_row(1, "b"))
    queue.add(make_row(2, "a"))
    found = queue.next(0, lambda revision: True)
    assert found is not None and found.id == 1, "a's debt is remembered while its row runs"
    queue.leave(row)
    queue.check_integrity()
