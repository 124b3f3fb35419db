from __future__ import annotations

import json

import pytest

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.cli.bench import train


def test_both_trainers_and_adapters_together_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    train("tiny", "1x24", "on", together="16", adapters=2, rank=4, seconds=0.01, device="cpu")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    theirs, ours, joined = (json.loads(line) for line in printed)
    assert (theirs["trainer"], ours["trainer"]) == ("peft", "adaplex")
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.5) and ours["times_peft"] > 0
    assert joined["adapters"] == 2 and joined["times_faster"] > 0


def test_batches_that_are_none_are_refused() -> None:
    for text in ("4", "0x4", "1:2", ""):
        with pytest.raises(InvalidRequest, match="ROWSxTOKENS"):
            train("tiny", text, device="cpu")
