"""What an engine tells of its steps, of its adapters' ways, and of when rows began."""

from __future__ import annotations

import pytest

from adaplex_server.engine.messages import Submit
from adaplex_server.vocabulary import SamplingParams
from support.stamping import World, make_world


def submit(world: World, number: int, revision: str | None, prompt: int, tokens: int) -> None:
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    world.inbox.put(Submit(number, [number + 1] * prompt, sampling, revision))


@pytest.mark.parametrize("overlap", [False, True])
def test_steps_are_told_by_what_their_rows_do(overlap: bool) -> None:
    world = make_world({"r1": 4}, overlap=overlap)
    submit(world, 1, "r1", prompt=9, tokens=6)
    submit(world, 2, None, prompt=5, tokens=6)
    world.settle()
    told = world.figures
    assert len(told) == world.engine.stats().steps
    # The last token of an answer is computed by nobody.
    assert sum(step.tokens for step in told) == 9 + 5 + 2 * 5
    assert sum(step.prefill_rows for step in told) == 2
    assert all(step.rows == step.base_rows + step.adapters <= 2 for step in told)
    assert max(step.adapters for step in told) == 1
    assert sum(step.seconds for step in told) == pytest.approx(world.engine.stats().step_seconds)


def test_an_adapters_way_is_told_once_a_stage() -> None:
    world = make_world({"r1": 4})
    submit(world, 1, "r1", prompt=3, tokens=2)
    world.settle()
    assert [(moved.revision, moved.stage) for moved in world.moves] == [("r1", "read"), ("r1", "copy")]
    assert all(moved.seconds >= 0 for moved in world.moves)


def test_the_first_token_tells_when_its_row_began() -> None:
    world = make_world({})
    world.now[0] = 50.0
    submit(world, 1, None, prompt=3, tokens=3)
    world.settle()
    assert [token.began for token in world.tokens[1]] == [50.0, 0.0, 0.0]
    assert world.ends[1][0].began == 0.0
