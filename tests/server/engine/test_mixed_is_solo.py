"""Every row of random mixed traffic is what PEFT gives for its adapter alone, on the same quantized base."""

from __future__ import annotations

import msgspec
import pytest
import torch

from adaplex_server.engine.messages import Submit
from adaplex_server.vocabulary import SamplingParams
from support.mixed import Oracle, Traffic, Zoo, compare, make_zoo, random_rounds, settings_for


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    torch.set_num_threads(1)
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize("overlap", [False, True])
def test_mixed_is_solo(zoo: Zoo, overlap: bool) -> None:
    traffic, base = Traffic.start(zoo, settings_for(zoo, overlap=overlap))
    random_rounds(traffic, zoo, rounds=200)
    verdict = compare(traffic, Oracle(zoo, base, torch.device("cpu")), tie=1e-3, close=1e-3)
    stats = traffic.engine.stats()
    assert verdict.rows > 600 and verdict.ties < verdict.tokens / 1000, (verdict, stats)
    assert stats.adapter_evictions > 50 and stats.preemptions > 0 and stats.prefix_hit_tokens > 200, (verdict, stats)


def test_a_wrong_adapter_never_passes_for_a_tie(zoo: Zoo) -> None:
    """The comparison itself: each row held against a neighbour's adapter, or the base, is refused."""
    traffic, base = Traffic.start(zoo, settings_for(zoo))
    names = [None, *zoo.revisions]
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=1)
    for row, name in enumerate(names):
        traffic.submit(Submit(row, [9, 8, 7, 60 + row], sampling, zoo.revisions[name] if name else None))
    traffic.settle()
    oracle = Oracle(zoo, base, torch.device("cpu"))
    assert compare(traffic, oracle, tie=1e-3, close=1e-3).rows == len(names)
    honest = dict(traffic.submits)
    for row, submit in honest.items():
        for other in {s.revision for s in honest.values()} - {submit.revision}:
            traffic.submits = {row: msgspec.structs.replace(submit, revision=other)}
            with pytest.raises(AssertionError):
                compare(traffic, oracle, tie=1e-3, close=1e-3)
