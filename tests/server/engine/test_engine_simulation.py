"""Random lives of an engine with tiny pools: every row ends once, each text is the row's alone, nothing is lost."""

from __future__ import annotations

import random
from functools import cache

import pytest

from adaplex_server.engine.messages import Cancel, DropAdapter, LoadAdapter, Submit
from adaplex_server.vocabulary import SamplingParams
from support.stamp_graphs import StampGraphs
from support.stamping import POISON, VOCAB, World, make_world

RANKS = {"r1": 1, "r2": 8, "r3": 9, "r4": 17, "r5": 30, "r6": 4, f"r{POISON}": 8}


def random_sampling(rng: random.Random) -> SamplingParams:
    extra: dict = {}
    if rng.random() < 0.3:
        extra |= {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
    if rng.random() < 0.3:
        extra |= {"top_k": rng.choice([0, 5]), "top_p": rng.choice([1.0, 0.8]), "min_p": rng.choice([0.0, 0.1])}
    if rng.random() < 0.2:
        extra |= {"logprobs": 2}
    if rng.random() < 0.15:
        extra |= {"prompt_logprobs": 1}
    return SamplingParams(
        max_tokens=rng.choice([0, 1, 3, 9, 20]) if "prompt_logprobs" in extra else rng.choice([1, 3, 9, 20]),
        min_tokens=rng.choice([0, 0, 4]),
        temperature=rng.choice([0.0, 0.0, 0.7, 1.3]),
        seed=rng.getrandbits(40),
        stop_token_ids=rng.choice([(), (7, 8)]),
        ignore_eos=rng.random() < 0.5,
        **extra,
    )


def random_prompt(rng: random.Random) -> list[int]:
    """Often with a beginning that others have too."""
    shared = [(i * 7) % VOCAB for i in range(30)][: rng.choice([0, 4, 9, 24])]
    return shared + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]


@cache
def solo_world() -> World:
    return make_world(RANKS, kv_pages=64, slots=6, adapter_pages=24, prefix_cache=False, max_step_tokens=64)


def check_alone(world: World, submit: Submit) -> None:
    """The row again, by itself, in another engine: same tokens, same log-probabilities, same end."""
    alone = solo_world()
    alone.inbox.put(msg := Submit(submit.row, submit.prompt, submit.sampling, submit.revision))
    alone.settle()
    mine, (end,) = world.tokens.get(submit.row, []), world.ends[submit.row]
    other, (solo_end,) = alone.tokens.pop(msg.row, []), alone.ends.pop(msg.row)
    if end.reason in ("stop", "length"):
        assert (end.reason, end.stop_token, end.prompt_logprobs) == (
            solo_end.reason,
            solo_end.stop_token,
            solo_end.prompt_logprobs,
        )
        assert len(mine) == len(other)
    if end.error == "RowFailed":
        assert solo_end.error == "RowFailed"
    for ours, theirs in zip(mine, other, strict=False):
        assert (ours.token, ours.logprob, ours.prompt_logprobs) == (
            theirs.token,
            theirs.logprob,
            theirs.prompt_logprobs,
        )


def life(seed: int, events: int, overlap: bool, captured: bool = False) -> World:
    """overlap: each step is launched before the tokens of the one before are known; captured: steps of few tokens are
    served as a GPU's; the texts are the same.
    """
    rng = random.Random(seed)
    # A captured step looks at all tokens of a prompt, and would find poison where the row alone does not.
    ranks = {name: rank for name, rank in RANKS.items() if not captured or name != f"r{POISON}"}
    world = make_world(
        ranks,
        graph_rows=(0, 24)[captured],
        copy_steps=(0, 1, 0, 5)[seed % 4],
        kv_pages=rng.choice([18, 24, 60]),
        slots=rng.choice([1, 2, 4]),
        adapter_pages=rng.choice([4, 6, 12]),
        max_rows=rng.choice([2, 5, 16]),
        max_waiting=rng.choice([3, 10, 40]),
        max_step_tokens=rng.choice([16, 19, 40]),
        host_adapter_bytes=rng.choice([100, 250, 10_000]),
        prefix_cache=rng.random() < 0.7,
        overlap=overlap,
    )
    submits: dict[int, Submit] = {}
    calls = 0
    for event in range(events):
        kind = rng.random()
        if kind < 0.35:
            revision = rng.choice([None, *ranks, "r77"]) if rng.random() < 0.7 else "r2"
            deadline = world.now[0] + rng.choice([1, 20, 80]) if rng.random() < 0.1 else None
            sampling = random_sampling(rng)
            submits[event] = Submit(
                event, random_prompt(rng), sampling, revision, deadline, rng.choice([0, 0, 0, 1, -1])
            )
            world.inbox.put(submits[event])
        elif kind < 0.42 and submits:
            world.inbox.put(Cancel(rng.choice(list(submits))))
        elif kind < 0.46:
            calls += 1
            world.inbox.put(LoadAdapter(calls, rng.choice(list(ranks))))
        elif kind < 0.49:
            calls += 1
            world.inbox.put(DropAdapter(calls, rng.choice(list(ranks))))
        elif kind < 0.5:
            world.model.fail_next = rng.choice([1, 1, 4])
        elif kind < 0.6:
            world.deliver()
        world.now[0] += 1
        world.step()
    world.settle()
    assert set(world.ends) == set(submits) and all(len(ends) == 1 for ends in world.ends.values())
    answered = [message.call for message in world.other]
    assert sorted(answered) == list(range(1, calls + 1)), "a load or drop was answered twice or not at all"
    for submit in submits.values():
        check_alone(world, submit)
    stats = world.engine.stats()
    assert (stats.waiting, stats.running, stats.pages_used) == (0, 0, 0), "pages or rows are left over"
    return world


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_random_lives(seed: int, overlap: bool) -> None:
    life(seed, events=260, overlap=overlap)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_lives_in_captured_steps(seed: int, overlap: bool) -> None:
    world = life(seed, events=260, overlap=overlap, captured=True)
    graphs = world.parts.executor.graphs
    assert isinstance(graphs, StampGraphs) and graphs.prompts > 20 and graphs.replays > 50


@pytest.mark.parametrize("overlap", [False, True])
def test_the_lives_reach_what_they_are_for(overlap: bool) -> None:
    """Preemption, eviction, prefix hits, overload, deadlines and failed rows all happen in these lives."""
    worlds = [life(seed, events=200, overlap=overlap) for seed in (100, 101, 102, 103, 104, 105)]
    stats = [world.engine.stats() for world in worlds]
    assert sum(s.preemptions for s in stats) > 5
    assert sum(s.adapter_evictions for s in stats) > 20
    assert sum(s.prefix_hit_tokens for s in stats) > 100
    errors = {end.error for world in worlds for (end,) in world.ends.values()}
    assert {end.reason for world in worlds for (end,) in world.ends.values()} == {
        "stop",
        "length",
        "cancelled",
        "error",
    }
    assert errors >= {"Overloaded", "DeadlineExceeded", "RowFailed", "ModelNotFound", "StorageFailed"}
