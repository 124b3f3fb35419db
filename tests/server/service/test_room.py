"""Places of a full server: shared between the models that are asked."""

from __future__ import annotations

import pytest

from adaplex_adapters.errors import Overloaded
from adaplex_server.service.room import Room


def test_a_full_server_takes_those_who_have_less_than_their_share() -> None:
    room = Room()
    for _ in range(8):
        room.check("flood", 1, 8)
        room.begin("flood")
    with pytest.raises(Overloaded) as refused:
        room.check("flood", 1, 8)
    assert refused.value.retry_after and refused.value.retry_after >= 1
    for _ in range(4):
        room.check("quiet", 1, 8)
        room.begin("quiet")
    for model in ("quiet", "flood"):
        with pytest.raises(Overloaded, match="12 rows"):
            room.check(model, 1, 8)
    with pytest.raises(Overloaded):
        room.check("third", 3, 8)
    for model in ("flood",) * 5:
        room.end(model)
    room.check("flood", 1, 8)


def test_the_hint_follows_the_time_of_requests() -> None:
    room = Room()
    for _ in range(50):
        room.answered(20.0)
    room.begin("a")
    with pytest.raises(Overloaded) as refused:
        room.check("a", 1, 1)
    assert refused.value.retry_after == pytest.approx(10, abs=0.5)
