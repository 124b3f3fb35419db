"""Loading, proving and dropping adapters in a running engine."""

from __future__ import annotations

from adaplex_server.engine.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterLoaded,
    Cancel,
    DropAdapter,
    LoadAdapter,
    Submit,
)
from adaplex_server.vocabulary import SamplingParams
from support.stamping import World, make_world


def row(world: World, number: int, revision: str, tokens: int = 4) -> None:
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    world.inbox.put(Submit(number, [1, 2, 3, 4, 5, 6, 7, 8, 9], sampling, revision))


def test_load_answers_with_the_proof_and_drop_with_the_bytes() -> None:
    world = make_world({"r1": 17})
    world.inbox.put(LoadAdapter(1, "r1"))
    world.settle()
    world.inbox.put(LoadAdapter(2, "r1"))
    world.settle()
    row(world, 5, "r1")
    world.settle()
    cached = world.engine.stats().pages_cached
    world.inbox.put(DropAdapter(3, "r1"))
    world.settle()
    first, second, dropped = world.other
    assert isinstance(first, AdapterLoaded) and first.max_logit_difference == 1.0 and first.device_bytes == 3000
    assert isinstance(second, AdapterLoaded) and dropped == AdapterDropped(3, "r1", 3000)
    stats = world.engine.stats()
    assert cached and (stats.pages_cached, stats.adapters_resident, stats.rank_rows_used) == (0, 0, 0)
    assert stats.adapter_loads == 1


def test_a_drop_waits_for_the_rows_and_refuses_new_ones_until_it_is_loaded_again() -> None:
    world = make_world({"r1": 1})
    row(world, 1, "r1", tokens=20)
    for _ in range(4):
        world.deliver()
        world.step()
    world.inbox.put(DropAdapter(1, "r1"))
    row(world, 2, "r1")
    world.step()
    assert not world.other and world.ends[2][0].error == "ModelNotFound"
    world.settle()
    assert len(world.tokens[1]) == 20 and world.other == [AdapterDropped(1, "r1", 1000)]
    row(world, 3, "r1")
    world.settle()
    assert world.ends[3][0].error == "ModelNotFound"
    world.inbox.put(LoadAdapter(2, "r1"))
    row(world, 4, "r1")
    world.settle()
    assert isinstance(world.other[1], AdapterLoaded) and world.ends[4][0].reason == "length"


def test_a_load_during_a_drop_keeps_the_adapter() -> None:
    world = make_world({"r1": 1})
    row(world, 1, "r1", tokens=20)
    for _ in range(4):
        world.deliver()
        world.step()
    world.inbox.put(DropAdapter(1, "r1"))
    world.inbox.put(LoadAdapter(2, "r1"))
    row(world, 2, "r1")
    world.settle()
    assert world.other[0] == AdapterDropped(1, "r1", 0) and isinstance(world.other[1], AdapterLoaded)
    assert world.ends[2][0].reason == "length" and world.engine.stats().adapters_resident == 1


def test_a_drop_right_after_a_load_answers_both() -> None:
    world = make_world({"r1": 1})
    world.inbox.put(LoadAdapter(1, "r1"))
    world.inbox.put(DropAdapter(2, "r1"))
    world.settle()
    assert [type(m) for m in world.other] == [AdapterLoaded, AdapterDropped]
    assert world.engine.stats().adapters_resident == 0


def test_refused_adapters_leave_nothing_and_end_their_rows() -> None:
    world = make_world({"r1": 1, "r2": 100}, useless=frozenset({"r1"}))
    for call, revision in enumerate(["r1", "r2", "r3"], start=1):
        world.inbox.put(LoadAdapter(call, revision))
        row(world, call, revision)
    world.settle()
    failed = {m.revision: m for m in world.other if isinstance(m, AdapterFailed)}
    assert {r: m.error for r, m in failed.items()} == {
        "r1": "InvalidAdapter",
        "r2": "InvalidAdapter",
        "r3": "StorageFailed",
    }
    assert "changes nothing" in failed["r1"].message and "rank 100" in failed["r2"].message
    assert {world.ends[n][0].error for n in (1, 2)} == {"InvalidAdapter"} and world.ends[3][0].error == "StorageFailed"
    assert world.engine.stats().rank_rows_used == 0


def test_a_load_waits_for_a_pinned_slot_and_other_rows_go_on() -> None:
    world = make_world({"r1": 1, "r2": 1}, slots=1)
    row(world, 1, "r1", tokens=20)
    for _ in range(4):
        world.deliver()
        world.step()
    world.inbox.put(LoadAdapter(1, "r2"))
    world.settle()
    assert isinstance(world.other[0], AdapterLoaded) and world.ends[1][0].reason == "length"


def test_rows_run_on_while_an_adapter_is_copied() -> None:
    world = make_world({"r1": 1, "r2": 1}, copy_steps=6)
    row(world, 1, "r1", tokens=30)
    while len(world.text(1)) < 3:
        world.deliver()
        world.step()
    row(world, 2, "r2")
    world.inbox.put(LoadAdapter(9, "r2"))
    for _ in range(5):
        before = len(world.text(1))
        world.deliver()
        world.step()
        assert len(world.text(1)) == before + 1 and not world.text(2) and not world.other
    world.settle()
    assert world.ends[2][0].reason == "length" and isinstance(world.other[0], AdapterLoaded)


def test_a_drop_waits_for_the_copy() -> None:
    world = make_world({"r1": 1, "r2": 1}, copy_steps=8)
    row(world, 1, "r1", tokens=30)
    while len(world.text(1)) < 3:
        world.deliver()
        world.step()
    row(world, 2, "r2")
    for _ in range(3):
        world.deliver()
        world.step()
    world.inbox.put(Cancel(2))
    world.inbox.put(DropAdapter(1, "r2"))
    world.settle()
    assert world.other == [AdapterDropped(1, "r2", 1000)] and world.engine.stats().adapters_resident == 1


def test_host_memory_stays_bounded() -> None:
    world = make_world({f"r{i}": 1 for i in range(1, 30)}, slots=2, host_adapter_bytes=350)
    hosts = world.parts.residency._hosts
    for i in range(1, 30):
        row(world, i, f"r{i}")
    for _ in range(300):
        world.deliver()
        world.step()
        assert hosts.nbytes <= 550, "the bound, and the two that are being read"
    world.settle()
    assert all(world.ends[i][0].reason == "length" for i in range(1, 30))
