"""What a request is told of its wait."""

from __future__ import annotations

import pytest

from adaplex_server.engine.admission import too_late
from adaplex_server.engine.pace import Pace


def test_nothing_is_expected_before_a_row_has_ended() -> None:
    assert Pace().wait(100, 8) == 0


def fill(pace: Pace, steps: int, seconds: float, rows: int = 300) -> None:
    now = 0.0
    pace.plan(now, busy=False)
    for _ in range(rows):
        pace.plan(now, busy=True)
        now += seconds
        pace.end(steps)
    pace.plan(now, busy=False)


def test_a_wait_is_the_time_of_the_rows_before() -> None:
    pace = Pace()
    fill(pace, 40, 0.1)
    assert pace.wait(7, 8) == pytest.approx(4.0) and pace.wait(31, 8) == pytest.approx(16.0)
    fill(pace, 10, 0.1)
    assert pace.wait(7, 8) == pytest.approx(1.0, rel=0.01), "the last rows count"


def test_a_wait_follows_the_time_of_steps_within_some_of_them() -> None:
    pace = Pace()
    fill(pace, 40, 0.1)
    fill(pace, 40, 0.3, rows=60)
    assert pace.wait(7, 8) > 10


def test_a_wait_that_is_always_longer_is_expected_to_be() -> None:
    """Rows of a long line are overtaken by those that come to shorter ones."""
    pace = Pace()
    pace.promise(-1, pace.wait(7, 8))
    fill(pace, 40, 0.1)
    pace.waited(-1, 50.0)
    assert pace.wait(7, 8) == pytest.approx(4.0), "nothing was promised"
    for row in range(400):
        pace.promise(row, pace.wait(7, 8))
        pace.waited(row, 6.0)
    assert pace.wait(7, 8) == pytest.approx(6.0, rel=0.05)
    pace.promise(1, 4.0)
    pace.forget(1)
    pace.waited(1, 100.0)
    assert pace.wait(7, 8) == pytest.approx(6.0, rel=0.05)


def test_idle_time_is_no_step() -> None:
    pace = Pace()
    fill(pace, 40, 0.1)
    pace.plan(1e6, busy=False)
    pace.plan(2e6, busy=True)
    pace.plan(2e6 + 0.1, busy=True)
    assert pace.wait(7, 8) == pytest.approx(4.0)


def test_a_hint_is_neither_at_once_nor_never() -> None:
    assert Pace().retry_after(0) > 0 and Pace().retry_after(1e6) == 60


def test_who_would_wait_too_long_is_refused() -> None:
    assert too_late(wait=9, longest=None, left=None) is None
    assert "9.0 s" in (too_late(wait=9, longest=8, left=None) or "")
    assert "its time ends" in (too_late(wait=9, longest=None, left=8) or "")
    assert too_late(wait=0, longest=8, left=1) is None
    assert too_late(wait=7, longest=8, left=None) and not too_late(wait=5, longest=8, left=None)
