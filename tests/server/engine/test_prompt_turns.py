"""New rows begin together where a step with prompts costs more than its work."""

from __future__ import annotations

import random

import pytest

from adaplex_server.engine.prompt_turns import PromptTurns

DECODE, FIXED, TOKEN = 0.005, 0.04, 0.00002
ROWS = 64


def serve(turns: PromptTurns | None, rate: float, prompt: int, seconds: float = 20.0) -> tuple[float, float]:
    """(rows a second, mean seconds until a row begins) of an engine whose steps cost what a GPU's do."""
    rng, now, came, began, ended = random.Random(1), 0.0, 0.0, [0.0], 0
    waiting: list[float] = []
    running: list[int] = []
    while now < seconds:
        while came <= now:
            waiting.append(came)
            came += rng.expovariate(rate)
        beginning: list[float] = []
        if turns is None or turns.may_begin(now) or not running:
            beginning, waiting = waiting[: ROWS - len(running)], waiting[ROWS - len(running) :]
        busy = bool(running or beginning)
        if turns is not None:
            turns.plan(now, prompt * len(beginning), busy=busy)
        now += DECODE + (FIXED + TOKEN * prompt * len(beginning) if beginning else 0) if busy else 0.001
        began += [now - at for at in beginning]
        running = [left - 1 for left in running if left > 1] + [rng.randint(24, 72) for _ in beginning]
        ended += len(beginning)
    return ended / seconds, sum(began) / len(began)


@pytest.mark.parametrize("prompt", [16, 512])
def test_a_busy_engine_serves_almost_twice_as_many(prompt: int) -> None:
    alone, _ = serve(None, 200.0, prompt)
    together, _ = serve(PromptTurns(), 200.0, prompt)
    assert together > 1.8 * alone


def test_a_calm_engine_begins_rows_almost_as_early() -> None:
    _, before = serve(None, 5.0, 64)
    _, after = serve(PromptTurns(), 5.0, 64)
    assert after < before + 0.05


def test_long_prompts_are_hardly_held_up() -> None:
    """Their own work is most of a step's time."""
    turns = PromptTurns()
    serve(turns, 20.0, 64, seconds=2.0)
    alone, _ = serve(None, 200.0, 8000)
    together, _ = serve(turns, 200.0, 8000)
    assert together > 0.9 * alone


def test_nothing_is_held_up_at_first_nor_after_a_rest() -> None:
    turns = PromptTurns()
    assert turns.may_begin(0.0)
    turns.plan(0.0, 100, busy=True)
    assert not turns.may_begin(0.1)
    turns.plan(0.1, 0, busy=False)
    assert turns.may_begin(50.0)
