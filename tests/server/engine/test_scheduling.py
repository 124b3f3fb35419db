"""Order, fairness and limits of the scheduler, seen through an engine with the stamping model."""

from __future__ import annotations

import pytest

from adaplex_server.engine.messages import Cancel, Submit
from adaplex_server.vocabulary import SamplingParams
from support.stamping import POISON, VOCAB, World, make_world

GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


def longer(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def submit(world: World, row: int, revision: str | None = None, sampling: SamplingParams = GREEDY, **more: int) -> None:
    world.inbox.put(Submit(row, [row % VOCAB, 5, 6], sampling, revision, **more))


def steps_until(world: World, row: int, most: int = 500) -> int:
    """Steps until the row has its first token."""
    for step in range(most):
        world.deliver()
        world.step()
        if row in world.tokens:
            return step
    raise AssertionError(f"row {row} starves")


def test_a_waiting_adapter_gets_the_only_slot_though_the_resident_one_never_rests() -> None:
    world = make_world({"r1": 1, "r2": 1}, slots=1, max_rows=4)
    for row in range(100, 400):
        submit(world, row, "r1", longer(6))
        if row == 120:
            submit(world, 1, "r2")
        if row == 130:
            submit(world, 2)
        world.deliver()
        world.step()
    assert {1, 2} <= world.ends.keys()
    world.settle()
    assert world.engine.stats().adapter_evictions >= 2


def test_rows_of_resident_adapters_do_not_wait_for_those_that_need_a_slot() -> None:
    world = make_world({"r1": 1, "r2": 1}, slots=1)
    submit(world, 1, "r1", longer(12))
    steps_until(world, 1)
    submit(world, 2, "r2")
    submit(world, 3, "r1")
    assert steps_until(world, 3) <= 1 and 2 not in world.tokens
    world.settle()
    assert all(ends[0].reason == "length" for ends in world.ends.values())


def test_adapters_take_turns_however_many_rows_one_has() -> None:
    world = make_world({"r1": 1, "r2": 1}, max_rows=1)
    for row in range(10):
        submit(world, row, "r1", longer(1))
    submit(world, 50, "r2", longer(1))
    submit(world, 51, None, longer(1))
    world.settle()
    order = list(world.ends)
    assert order.index(50) <= 4 and order.index(51) <= 4
    assert [row for row in order if row < 10] == list(range(10))


def test_priority_goes_first_and_is_preempted_last() -> None:
    world = make_world({}, max_rows=1)
    submit(world, 1, sampling=longer(2))
    world.step()
    submit(world, 2)
    submit(world, 3, priority=-1)
    submit(world, 4, priority=1)
    world.settle()
    assert list(world.ends) == [1, 3, 2, 4]

    world = make_world({}, kv_pages=14, prefix_cache=False)
    submit(world, 1, sampling=longer(40))
    submit(world, 2, sampling=longer(40), priority=-1)
    world.settle()
    assert list(world.ends) == [2, 1] and world.engine.stats().preemptions >= 1


def test_a_long_prompt_is_read_in_chunks_beside_decodes() -> None:
    world = make_world({}, max_step_tokens=16, kv_pages=64)
    submit(world, 1, sampling=longer(30))
    steps_until(world, 1)
    world.inbox.put(Submit(2, [i % VOCAB for i in range(50)], GREEDY))
    before = len(world.tokens[1])
    steps = steps_until(world, 2)
    assert steps == 3 and len(world.tokens[1]) == before + 4 and world.model.largest_step == 16


def test_the_queue_is_bounded_and_hints_when_to_retry() -> None:
    world = make_world({}, max_rows=1, max_waiting=2)
    submit(world, 0, sampling=longer(20))
    world.step()
    for row in range(1, 5):
        submit(world, row)
    world.step()
    refused = [ends[0] for ends in world.ends.values()]
    assert [end.row for end in refused] == [3, 4]
    assert all(end.error == "Overloaded" and end.retry_after and end.retry_after > 0 for end in refused)
    world.settle()
    assert len(world.ends) == 5


def test_who_would_wait_too_long_is_refused_at_once_and_who_has_waited_too_long_then() -> None:
    world = make_world({}, max_rows=1, max_waiting=100, max_wait=20)
    for row in range(3):
        submit(world, row, sampling=longer(9))
        for _ in range(12):
            world.now[0] += 1
            world.step()
    for row in range(10, 15):
        submit(world, row, sampling=longer(9))
        world.step()
    refused = [row for row, ends in world.ends.items() if ends[0].error == "Overloaded"]
    assert refused and set(refused) < set(range(11, 15)), "about two rows end in 20 s"
    world.now[0] += 30
    world.settle()
    late = {row: ends[0].message for row, ends in world.ends.items() if ends[0].error == "Overloaded"}
    assert set(late) == set(range(11, 15)) and sum("has waited" in what for what in late.values()) >= 1
    assert world.ends[10][0].reason == "length"


def test_a_deadline_that_cannot_be_met_is_told_at_once() -> None:
    world = make_world({}, max_rows=1, max_waiting=100)
    for row in range(2):
        submit(world, row, sampling=longer(9))
        for _ in range(12):
            world.now[0] += 1
            world.step()
    submit(world, 5, sampling=longer(9))
    world.step()
    now = int(world.now[0])
    submit(world, 6, sampling=longer(9), deadline=now + 3)
    submit(world, 7, sampling=longer(9), deadline=now + 60)
    world.step()
    assert world.ends[6][0].error == "Overloaded" and "its time ends" in world.ends[6][0].message
    world.settle()
    assert world.ends[7][0].reason == "length"


@pytest.mark.parametrize("overlap", [False, True])
def test_an_adapter_begins_within_a_row_of_the_flood_of_another(overlap: bool) -> None:
    """50 of r1 wait and 4 run; r2 begins when the first of these has ended."""
    world = make_world({"r1": 1, "r2": 1}, max_rows=4, max_waiting=100, overlap=overlap)
    for row in range(54):
        submit(world, row, "r1", longer(8))
    steps_until(world, 0)
    submit(world, 100, "r2", longer(8))
    assert steps_until(world, 100) <= 12
    world.settle()


def test_a_full_queue_is_shared_between_adapters() -> None:
    """r1 has filled the queue: r2 takes a place of its, and no more than its share; an urgent row takes any."""
    world = make_world({"r1": 1, "r2": 1}, max_rows=1, max_waiting=4)
    submit(world, 0, "r1", longer(40))
    steps_until(world, 0)
    for row in (1, 2, 3, 4, 10, 11, 12, 13):
        submit(world, row, "r1" if row < 10 else "r2", longer(8))
        world.step()
    refused = [row for row, ends in world.ends.items() if ends[0].error == "Overloaded"]
    assert sorted(refused) == [3, 4, 12, 13] and world.engine.stats().waiting == 4
    world.inbox.put(Submit(20, [5], longer(8), "r2", priority=-1))
    world.step()
    assert world.engine.stats().waiting == 4 and len(world.ends) == 5 and 20 not in world.ends
    world.settle()
    assert world.ends[20][0].reason == world.ends[10][0].reason == "length"


def test_rows_that_arrive_together_fill_the_free_places_before_the_queue() -> None:
    world = make_world({}, max_rows=3, max_waiting=2)
    for row in range(7):
        submit(world, row)
    world.settle()
    assert [row for row, ends in world.ends.items() if ends[0].error == "Overloaded"] == [5, 6]


def test_cancel_and_deadline_free_within_a_step() -> None:
    world = make_world({"r1": 1}, max_rows=1)
    submit(world, 1, "r1", longer(30))
    steps_until(world, 1)
    submit(world, 2, deadline=5)
    submit(world, 3, sampling=longer(50), deadline=9)
    world.inbox.put(Cancel(1))
    world.step()
    assert world.ends[1][0].reason == "cancelled" and world.engine.stats().running == 1
    world.now[0] = 6
    world.step()
    world.now[0] = 10
    world.step()
    assert world.engine.stats().running == 0 and world.engine.stats().pages_used == 0
    world.settle()
    assert {world.ends[r][0].error for r in (2, 3)} <= {None, "DeadlineExceeded"}
    assert world.ends[3][0].error == "DeadlineExceeded" and "generating" in world.ends[3][0].message


def test_what_cannot_fit_is_refused_and_the_context_ends_the_rest() -> None:
    world = make_world({}, context=20)
    world.inbox.put(Submit(1, list(range(20)), GREEDY))
    world.inbox.put(Submit(2, list(range(17)), GREEDY))
    world.inbox.put(Submit(3, [], GREEDY))
    world.inbox.put(Submit(4, [1], SamplingParams(max_tokens=0)))
    world.settle()
    assert world.ends[1][0].error == world.ends[3][0].error == "PromptTooLong"
    assert world.ends[2][0].reason == "length" and len(world.tokens[2]) == 3
    assert world.ends[4][0].reason == "length" and 4 not in world.tokens


def test_token_ids_outside_the_vocabulary_end_only_their_row() -> None:
    world = make_world({})
    bad = [
        ([VOCAB], GREEDY),
        ([-1], GREEDY),
        ([1], SamplingParams(max_tokens=4, logit_bias={VOCAB + 5: 1.0})),
        ([1], SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=(10**9,))),
    ]
    for row, (prompt, sampling) in enumerate(bad):
        world.inbox.put(Submit(row, prompt, sampling))
    submit(world, 9)
    world.settle()
    assert [world.ends[row][0].error for row in range(4)] == ["InvalidRequest"] * 4
    assert world.ends[9][0].reason == "length"


def test_no_tenant_finds_what_another_has_asked() -> None:
    world = make_world({"r1": 1})
    prompt = [i % VOCAB for i in range(21)]
    asked = [(None, ""), (None, "a"), (None, "a"), (None, "b"), ("r1", "a"), ("r1", "b"), ("r1", "b"), (None, "")]
    for row, (revision, tenant) in enumerate(asked):
        world.inbox.put(Submit(row, prompt, GREEDY, revision, tenant=tenant))
        world.settle()
    assert [world.tokens[row][0].cached_tokens for row in range(8)] == [0, 0, 20, 0, 0, 0, 20, 20]
    assert world.text(0) == world.text(1) == world.text(3) != world.text(4) == world.text(5)


def test_a_prefix_is_found_again_and_told() -> None:
    world = make_world({"r1": 1})
    prompt = [i % VOCAB for i in range(21)]
    for row, revision in enumerate([None, None, "r1", "r1"]):
        world.inbox.put(Submit(row, prompt, GREEDY, revision))
        world.settle()
    assert [world.tokens[row][0].cached_tokens for row in range(4)] == [0, 20, 0, 20]
    assert world.text(0) == world.text(1) != world.text(2) == world.text(3)


@pytest.mark.parametrize("overlap", [False, True])
def test_out_of_memory_makes_steps_smaller_and_never_ends_the_engine(overlap: bool) -> None:
    quiet, short = make_world({}), make_world({}, overlap=overlap)
    for world in (quiet, short):
        for row in range(6):
            submit(world, row, sampling=longer(10))
    for _ in range(4):
        quiet.step()
        short.step()
    short.model.fail_next = 3
    quiet.settle()
    short.settle()
    assert all(short.text(row) == quiet.text(row) for row in range(6)) and short.engine.stats().preemptions >= 3

    submit(short, 9)
    short.model.fail_next = 50
    short.settle()
    assert short.ends[9][0].error == "Unavailable" and short.ends[9][0].retry_after


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failed_row_leaves_no_trace_in_cache_or_pages(overlap: bool) -> None:
    """Its numbers are not finite, and its neighbours, the next row on its pages, and the same prompt later are."""
    poisoned = f"r{POISON}"
    world = make_world({poisoned: 1}, kv_pages=24, overlap=overlap)
    kept = []
    for row in range(40):
        world.inbox.put(Submit(row, [(row + i) % VOCAB for i in range(9)], longer(6), poisoned))
        world.settle()
        (end,) = world.ends[row]
        if end.error is None:
            kept.append(row)
            continue
        assert end.error == "RowFailed"
        world.inbox.put(Submit(100 + row, [1], GREEDY))
        world.settle()
        assert bool(world.kv.keys[0].isfinite().all()), "a page of the failed row was not zeroed"
        before = world.parts.scheduler.hit_tokens
        world.inbox.put(Submit(200 + row, [(row + i) % VOCAB for i in range(9)], longer(1), poisoned))
        world.settle()
        assert world.parts.scheduler.hit_tokens == before, "a page of the failed row is still in the prefix cache"
    assert 0 < len(kept) < 40


@pytest.mark.parametrize("overlap", [False, True])
def test_a_scored_prompt_survives_preemption(overlap: bool) -> None:
    """The row is thrown out in the middle of its prompt; its scores are those of an undisturbed one."""
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, prompt_logprobs=1)
    prompt = [i % VOCAB for i in range(36)]
    quiet, short = make_world({}, max_scores=2), make_world({}, max_scores=2, kv_pages=16, overlap=overlap)
    submit(short, 1, sampling=longer(40))
    steps_until(short, 1)
    for world in (quiet, short):
        world.inbox.put(Submit(2, prompt, sampling))
        world.settle()
    assert short.engine.stats().preemptions >= 1
    assert short.tokens[2] == quiet.tokens[2] and len(short.tokens[2][0].prompt_logprobs or []) == 36
