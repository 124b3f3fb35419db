"""Mixed is solo for adapters of every kind at once: random traffic with loads, proofs, evictions, drops and shared
prefixes, each row held against the same adapter alone in a model of transformers. And what an engine refuses.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adaplex_adapters.identity import described
from adaplex_adapters.store import AdapterStore
from adaplex_server.engine.messages import AdapterFailed, AdapterLoaded, DropAdapter, LoadAdapter
from adaplex_server.model.families import base_shape
from support.kinds_zoo import ends, own_head, with_kinds
from support.mixed import RECIPES, Traffic, Zoo, compare, make_zoo, random_rounds, settings_for
from support.side_by_side import bottlenecks
from support.tiny_models import load_tiny


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    torch.set_num_threads(1)
    return make_zoo(tmp_path, {"o-3": RECIPES["o-3"]})


def test_mixed_is_solo(zoo: Zoo) -> None:
    oracle = with_kinds(zoo)
    traffic, _ = Traffic.start(zoo, settings_for(zoo, quantize="none", max_slots=3))
    random_rounds(traffic, zoo, rounds=25)
    verdict = compare(traffic, oracle, tie=1e-3, close=1e-3)  # type: ignore[arg-type]
    stats = traffic.engine.stats()
    assert verdict.rows > 60 and stats.adapter_evictions > 5 and stats.prefix_hit_tokens > 0, (verdict, stats)
    refused = [answer for answer in traffic.answers.values() if isinstance(answer, AdapterFailed)]
    assert not refused, refused


def test_what_is_refused_is_named(zoo: Zoo) -> None:
    base, store = load_tiny(zoo.base), AdapterStore(zoo.store)
    head = base_shape(base.config).head
    foreign = replace(ends(base, 1), base_copies={head: base.head + 1})
    wide = bottlenecks(base, 40, 1, "block")
    nothing = replace(
        bottlenecks(base, 4, 1, "block"),
        bottlenecks={
            place: replace(one, up=one.up * 0, up_bias=one.up_bias * 0)
            for place, one in bottlenecks(base, 4, 1, "block").bottlenecks.items()
        },
    )
    traffic, _ = Traffic.start(zoo, settings_for(zoo, quantize="none", max_rank=32, max_head_bytes=20_000))
    cases = [
        (foreign, "wrong base"),
        (wide, "max_rank"),
        (own_head(base, 1), "max_head_memory"),
        (nothing, "changes noth"),
    ]
    good = store.commit(described(ends(base, 2)))
    for call, (adapter, words) in enumerate(cases):
        traffic.inbox.put(LoadAdapter(call, store.commit(described(adapter))))
        while call not in traffic.answers:
            traffic.step(wait=False)
        answer = traffic.answers[call]
        assert isinstance(answer, AdapterFailed) and words in answer.message, answer
    traffic.inbox.put(LoadAdapter(10, good))
    while 10 not in traffic.answers:
        traffic.step(wait=False)
    assert isinstance(traffic.answers[10], AdapterLoaded)
    traffic.inbox.put(DropAdapter(11, good))
    while 11 not in traffic.answers:
        traffic.step(wait=False)
    stats = traffic.engine.stats()
    assert stats.adapters_resident == 0 and stats.rank_rows_used == 0
