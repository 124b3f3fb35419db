"""A step in flight while the next is launched: what it uses stays held, what it wastes is dropped, nothing differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from adaplex_server.engine.chosen import Chosen
from adaplex_server.engine.messages import AdapterDropped, Cancel, DropAdapter, Submit
from adaplex_server.engine.row import Work
from adaplex_server.engine.sampler import Sampler
from adaplex_server.vocabulary import SamplingParams
from support.stamping import POISON, VOCAB, World, make_world

PROMPT = [i % VOCAB for i in range(9)]


def sampling(tokens: int = 12, **more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, **more})


def begun(world: World, revision: str | None, wish: SamplingParams) -> None:
    world.inbox.put(Submit(1, PROMPT, wish, revision))
    world.deliver()
    while 1 not in world.tokens:
        world.step()
        world.deliver()


def text_of(revision: str | None, wish: SamplingParams) -> list[int]:
    """Step by step, alone."""
    world = make_world({"r1": 1})
    world.inbox.put(Submit(1, PROMPT, wish, revision))
    world.settle()
    return world.text(1)


def held(world: World) -> tuple[int, int]:
    """KV pages, and pins of r1."""
    return world.engine.stats().pages_used, world.parts.slots.pinned("r1")


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_known() -> None:
    world = make_world({}, overlap=True)
    world.inbox.put(Submit(1, PROMPT, sampling(3)))
    told = []
    for _ in range(4):
        world.step()
        told.append((world.model.steps, len(world.text(1))))
    # The last token needs no step after it, and none is launched.
    assert told == [(1, 0), (2, 1), (3, 2), (3, 3)]
    assert world.ends[1][0].reason == "length" and not world.step()


@pytest.mark.parametrize("cause", ["stop", "cancel", "deadline"])
def test_pages_and_slot_of_an_ended_row_are_held_until_its_last_step_is_settled(cause: str) -> None:
    text = text_of("r1", sampling(12))
    stop = next(i for i in range(2, 12) if text[i] not in text[:i])
    world = make_world({"r1": 1}, overlap=True, prefix_cache=False)
    begun(world, "r1", sampling(12, stop_token_ids=(text[stop],)) if cause == "stop" else sampling(12))
    if cause == "cancel":
        world.inbox.put(Cancel(1))
    if cause == "deadline":
        world.parts.scheduler._rows[1].deadline = world.now[0]
    while 1 not in world.ends:
        world.step()
    reason = {"stop": "stop", "cancel": "cancelled", "deadline": "error"}[cause]
    assert world.ends[1][0].reason == reason and world.engine.stats().running == 0
    if cause == "stop":
        assert world.text(1) == text[:stop]
        assert held(world) == (1, 1), "the wasted place writes one page and reads the slot"
        world.step()
    assert held(world) == (0, 0)


def test_a_cancelled_row_holds_what_its_step_in_flight_uses() -> None:
    """Also in the middle of its prompt: all that the chunk in flight may write."""
    world = make_world({"r1": 1}, overlap=True, prefix_cache=False, max_step_tokens=16, kv_pages=40)
    world.inbox.put(Submit(1, [i % VOCAB for i in range(40)], sampling(), "r1"))
    for _ in range(4):
        world.deliver()
        world.step()
    assert world.model.steps and not world.text(1)
    world.parts.scheduler.cancel(1)
    world.parts.check_integrity()
    pages, pins = held(world)
    assert pages > 0 and pins == 1
    world.step()
    assert held(world) == (0, 0)


def test_an_adapter_is_dropped_when_no_step_in_flight_reads_it() -> None:
    world = make_world({"r1": 1}, overlap=True)
    begun(world, "r1", sampling(12))
    world.inbox.put(DropAdapter(7, "r1"))
    world.step()
    world.parts.scheduler.cancel(1)
    world.parts.residency.settle_drops()
    assert not world.sent and world.parts.slots.slot("r1") is not None
    world.settle()
    assert [type(m) for m in world.other if getattr(m, "call", None) == 7] == [AdapterDropped]
    assert world.parts.slots.slot("r1") is None


@pytest.mark.parametrize("stops", [(), tuple(range(0, VOCAB, 2))])
def test_the_step_after_a_failed_row_is_fed_with_a_token_and_its_page_is_zeroed(stops: tuple[int, ...]) -> None:
    """With stops, also the page of a row that has ended well and whose wasted place fails."""
    poisoned = f"r{POISON}"
    world = make_world({poisoned: 1}, overlap=True, kv_pages=24, prefix_cache=False)
    failed = 0
    for row in range(60):
        wish = sampling(9, stop_token_ids=stops)
        world.inbox.put(Submit(row, [(row + i) % VOCAB for i in range(3)], wish, poisoned))
        world.inbox.put(Submit(100 + row, [row], sampling(9)))
        while world.step() or world.asked:
            world.deliver()
            free = world.kv.keys[0][world.parts.pool._free]
            assert bool(free.isfinite().all()), "a page that a wasted place wrote was given back as it was"
        assert world.ends[100 + row][0].reason == "length"
        failed += world.ends[row][0].error == "RowFailed"
        assert bool(world.kv.keys[0].isfinite().all())
        assert min(world.model.tokens) >= 0 and max(world.model.tokens) < VOCAB
    assert 5 < failed < 60 and world.engine.stats().pages_used == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_pages_of_the_answer_are_found_again(overlap: bool) -> None:
    world = make_world({}, overlap=overlap)
    world.inbox.put(Submit(1, PROMPT, sampling(12)))
    world.settle()
    world.inbox.put(Submit(2, [*PROMPT, *world.text(1), 5], sampling(1)))
    world.settle()
    # Of 9 and 12 tokens the last one was never computed, and a page has 4.
    assert world.tokens[2][0].cached_tokens == 20


class Forgetful(Sampler):
    """Finds no memory the next `failing` times."""

    failing = 0

    def __call__(self, logits: torch.Tensor, work: Sequence[Work], best: torch.Tensor | None = None) -> Chosen:
        if self.failing:
            self.failing -= 1
            raise torch.OutOfMemoryError("pretended")
        return super().__call__(logits, work, best)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("stops", [False, True])
def test_a_choice_that_finds_no_memory_is_made_again(overlap: bool, stops: bool) -> None:
    wish = sampling(12, stop_token_ids=(7, 8, 9, 10, 11, 12) if stops else ())
    wanted = make_world({}, prefix_cache=False)
    world = make_world({}, overlap=overlap, prefix_cache=False)
    sampler = world.parts.executor._sampler = Forgetful(frozenset())
    for one in (wanted, world):
        for row in range(6):
            one.inbox.put(Submit(row, [row, *PROMPT], wish))
    for step in range(30):
        sampler.failing = step % 3 == 2
        world.step()
    sampler.failing = 0
    world.settle()
    wanted.settle()
    assert [world.text(row) for row in range(6)] == [wanted.text(row) for row in range(6)]
    assert world.engine.stats().preemptions > 0
