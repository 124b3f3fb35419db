"""The engine on the GPU with adapters of every kind: captured steps, and eager ones where a row has its own head."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.kinds_zoo import with_kinds
from support.mixed import RECIPES, Traffic, compare, make_zoo, random_rounds, settings_for


@pytest.mark.parametrize("overlap", [False, True])
def test_mixed_is_solo(overlap: bool, tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path, {"o-3": RECIPES["o-3"]})
    oracle = with_kinds(zoo)
    settings = settings_for(zoo, quantize="none", max_slots=3, device="cuda", overlap=overlap)
    traffic, _ = Traffic.start(zoo, settings)
    random_rounds(traffic, zoo, rounds=60)
    verdict = compare(traffic, oracle, tie=1e-3, close=2e-3)  # type: ignore[arg-type]
    stats, graphs = traffic.engine.stats(), traffic.engine.parts.executor.graphs
    assert verdict.rows > 150 and stats.adapter_evictions > 10, (verdict, stats)
    assert graphs is not None and graphs.replays > 20
