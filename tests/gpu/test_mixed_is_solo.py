"""The engine on the GPU, with captured decode steps: random mixed traffic is what PEFT gives for each adapter alone."""

from __future__ import annotations

import msgspec
import pytest
import torch

from adaplex_server.engine.messages import RowToken
from support.mixed import Oracle, Traffic, Zoo, compare, make_zoo, random_rounds, settings_for

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize("overlap", [False, True])
def test_mixed_is_solo(zoo: Zoo, overlap: bool) -> None:
    traffic, base = Traffic.start(zoo, settings_for(zoo, device="cuda", overlap=overlap))
    random_rounds(traffic, zoo, rounds=200)
    verdict = compare(traffic, Oracle(zoo, base, CUDA), tie=1e-3, close=1e-3)
    stats, graphs = traffic.engine.stats(), traffic.engine.parts.executor.graphs
    print(verdict, stats, graphs and (graphs.replays, len(graphs)))
    assert verdict.rows > 600 and verdict.ties < verdict.tokens / 1000, (verdict, stats)
    assert stats.adapter_evictions > 50 and stats.preemptions > 0 and stats.prefix_hit_tokens > 200, (verdict, stats)
    assert graphs is not None and graphs.replays > 500


@pytest.mark.parametrize(("dtype", "overlap"), [("bfloat16", False), ("bfloat16", True), ("float16", True)])
def test_captured_steps_change_no_number(zoo: Zoo, dtype: str, overlap: bool) -> None:
    """Two engines, one without graphs, under the same traffic, with room for all of it: nothing is computed again."""

    def tokens(graphs: bool) -> dict[int, list[RowToken]]:
        settings = settings_for(
            zoo,
            device="cuda",
            dtype=dtype,
            decode_graphs=graphs,
            overlap=overlap,
            prefix_cache=False,
            kv_bytes=None,
            adapter_bytes=None,
            max_slots=16,
            max_rows=40,
        )
        traffic, _ = Traffic.start(zoo, settings)
        random_rounds(traffic, zoo, rounds=25, seed=3)
        assert traffic.engine.stats().preemptions == 0
        found = traffic.engine.parts.executor.graphs
        assert (found is not None and found.replays > 50) if graphs else found is None
        return traffic.tokens

    eager, captured = tokens(False), tokens(True)
    for row in eager.keys() & captured.keys():
        # A cancelled row may have come further in one of them.
        pairs = list(zip(eager[row], captured[row], strict=False))
        assert pairs and all(msgspec.json.encode(a) == msgspec.json.encode(b) for a, b in pairs), row
