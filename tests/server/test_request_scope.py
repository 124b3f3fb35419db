"""Whose trace a request belongs to, and what its log lines call it."""

from __future__ import annotations

import asyncio
from contextvars import copy_context

import pytest

from adaplex_server.request_scope import RequestScope, current_scope, open_scope

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def opened(*sent: str) -> RequestScope:
    """In a context of its own, so that no other test is in it."""

    def found() -> RequestScope:
        scope = open_scope(*sent)
        assert current_scope() is scope
        return scope

    return copy_context().run(found)


def test_a_valid_parent_gives_the_trace() -> None:
    scope = opened("r1", f"00-{TRACE}-{PARENT}-01", "vendor=1")
    assert (scope.trace_id, scope.tracestate) == (TRACE, "vendor=1") and current_scope() is None


@pytest.mark.parametrize(
    "parent",
    ["", "x", f"ff-{TRACE}-{PARENT}-01", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}-01"],
)
def test_any_other_is_as_if_it_were_not_there(parent: str) -> None:
    assert opened("r1", parent).trace_id == "" and opened("r1", parent).traceparent == ""


def test_an_id_cannot_forge_a_line() -> None:
    assert "\n" not in opened("a\nERROR adaplex: all is lost").request_id
    assert len(opened("x" * 10_000).request_id) <= 128


async def test_tasks_of_a_request_share_its_scope_and_others_do_not() -> None:
    async def request(name: str) -> str:
        scope = open_scope(name)

        async def below() -> None:
            found = current_scope()
            assert found is not None and found.request_id == name
            found.trace_id = f"trace of {name}"

        await asyncio.create_task(below())
        return scope.trace_id

    assert await asyncio.gather(request("a"), request("b")) == ["trace of a", "trace of b"]
