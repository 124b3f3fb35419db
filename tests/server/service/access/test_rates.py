"""Token buckets under a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaplex_adapters.errors import RateLimited
from adaplex_server.caller import Limits
from adaplex_server.service.access.rates import Rates


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_are_spread_over_the_minute() -> None:
    clock = Clock()
    rates = Rates(clock)
    limits = {"k": Limits(requests=2)}
    for _ in range(2):
        rates.admit(limits, 1).release()
    with pytest.raises(RateLimited, match="2 requests a minute") as refused:
        rates.admit(limits, 1)
    assert refused.value.retry_after == pytest.approx(30.0)
    clock.now += 30.0
    rates.admit(limits, 1)


def test_an_answer_is_charged_as_it_grows_and_the_next_request_waits() -> None:
    clock = Clock()
    rates = Rates(clock)
    limits = {"k": Limits(tokens=60)}
    lease = rates.admit(limits, 10)
    lease.used(80)
    lease.release()
    with pytest.raises(RateLimited) as refused:
        rates.admit(limits, 9)
    assert refused.value.retry_after == pytest.approx(40.0)
    clock.now += 40.0
    rates.admit(limits, 9)


def test_a_prompt_above_the_allowance_passes_a_full_bucket() -> None:
    clock = Clock()
    rates = Rates(clock)
    rates.admit({"k": Limits(tokens=10)}, 50).release()
    with pytest.raises(RateLimited):
        rates.admit({"k": Limits(tokens=10)}, 1)
    clock.now += 360.0
    rates.admit({"k": Limits(tokens=10)}, 50)


def test_streams_count_until_released() -> None:
    rates = Rates(Clock())
    first = rates.admit({"k": Limits(streams=1)}, 1)
    with pytest.raises(RateLimited, match="1 requests under way"):
        rates.admit({"k": Limits(streams=1)}, 1)
    first.release()
    rates.admit({"k": Limits(streams=1)}, 1)


def test_a_refusal_charges_nobody() -> None:
    rates = Rates(Clock())
    with pytest.raises(RateLimited):
        rates.admit({"a": Limits(requests=5), "b": Limits(streams=0)}, 1)
    assert rates.headers("a", Limits(requests=5))["x-ratelimit-remaining-requests"] == "5"


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 30)), max_size=60))
def test_no_minute_passes_more_requests_than_a_full_bucket_and_its_inflow(steps: list[tuple[float, int]]) -> None:
    clock, passed = Clock(), []
    rates = Rates(clock)
    for pause, tokens in steps:
        clock.now += pause
        try:
            rates.admit({"k": Limits(requests=10)}, tokens).release()
        except RateLimited:
            continue
        passed.append(clock.now)
    for begin in passed:
        assert sum(begin <= at < begin + 60 for at in passed) <= 20


def test_what_is_not_limited_is_not_told() -> None:
    assert Rates(Clock()).headers("k", Limits()) == {}
