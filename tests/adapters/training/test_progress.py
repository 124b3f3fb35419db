from __future__ import annotations

import io

import pytest

from adaplex_adapters.training.loop import StepReport
from adaplex_adapters.training.progress import BarProgress, LineProgress, ShownProgress


def test_lines_are_few_and_the_last_step_is_always_told() -> None:
    out = io.StringIO()
    lines = LineProgress(out, every=3600)
    lines.note("reading")
    lines.begin(100, 0)
    for step in range(1, 101):
        lines.step(StepReport(step, 1.0 / step, 1e-3, 1.0, 10))
    told = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in told] == ["reading", "step 1/100", "step 100/100"]
    assert "loss 0.0100" in told[-1]


def test_the_bar_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with ShownProgress() as shown:
        assert isinstance(shown, LineProgress)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with ShownProgress() as shown:
        assert isinstance(shown, BarProgress)
        shown.begin(2, 0)
        shown.step(StepReport(1, 1.0, 1e-3, 1.0, 10))
        shown.note("[not markup]")
