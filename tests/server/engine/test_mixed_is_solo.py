"""Every row of random mixed traffic is what PEFT gives for its adapter alone, on the same quantized base."""

from __future__ import annotations

import pytest
import torch

from support.mixed import Oracle, Traffic, Zoo, compare, make_zoo, random_rounds, settings_for


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    torch.set_num_threads(1)
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def test_mixed_is_solo(zoo: Zoo) -> None:
    traffic, base = Traffic.start(zoo, settings_for(zoo))
    random_rounds(traffic, zoo, rounds=200)
    verdict = compare(traffic, Oracle(zoo, base, torch.device("cpu")), tie=1e-3, close=1e-3)
    stats = traffic.engine.stats()
    assert verdict.rows > 600 and verdict.ties < verdict.tokens / 1000
    assert stats.adapter_evictions > 50 and stats.preemptions > 5 and stats.prefix_hit_tokens > 1000
