"""Mixed is solo for adapters of every kind at once: random traffic with loads, proofs, evictions, drops and shared
prefixes, each row held against the same adapter alone in a model of transformers. And what an engine refuses.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adaplex_adapters.identity import described
from adaplex_adapters.spec import KIND_LORA, Adapter, LoraModule, draft
from adaplex_adapters.store import AdapterStore
from adaplex_server.engine.messages import AdapterFailed, AdapterLoaded, DropAdapter, LoadAdapter
from adaplex_server.model.base import Base
from adaplex_server.model.families import base_shape
from support import adapter_reference
from support.mixed import RECIPES, Traffic, Zoo, compare, make_zoo, random_rounds, settings_for
from support.side_by_side import bottlenecks, dora, ia3, lora
from support.tiny_models import load_tiny


def ends(base: Base, seed: int) -> Adapter:
    """LoRAs of the embedding and the head, which come with the base's own weights."""
    generator, shape, config = torch.Generator().manual_seed(seed), base_shape(base.config), base.config
    a, b = torch.randn(4, config.vocab_size, generator=generator), torch.randn(64, 4, generator=generator) * 0.05
    embedding = LoraModule(a, b, 1.0, embedding=True)
    a, b = torch.randn(4, 64, generator=generator) * 0.1, torch.randn(config.vocab_size, 4, generator=generator)
    modules = {shape.embedding: embedding, shape.head: LoraModule(a, b, 0.5)}
    return Adapter(draft(KIND_LORA, "tiny"), modules=modules, base_copies={shape.head: base.head.clone()})


def own_head(base: Base, seed: int) -> Adapter:
    weight = torch.randn(base.head.shape, generator=torch.Generator().manual_seed(seed)) * 0.15
    return Adapter(
        draft(KIND_LORA, "tiny"), lora(base, 2, seed).modules, replaced={base_shape(base.config).head: weight}
    )


def adapters_of(base: Base) -> dict[str, Adapter]:
    both = replace(bottlenecks(base, 8, 4, "stream"), modules=lora(base, 9, 4).modules)
    found = {
        "houlsby": bottlenecks(base, 16, 1, "block"), "pfeiffer": bottlenecks(base, 20, 2, "sum"), "both": both,
        "ends": ends(base, 5), "head": own_head(base, 6), "dora": dora(base, 3, 7), "ia3": ia3(base, 8),
    }  # fmt: skip
    return {name: described(adapter) for name, adapter in found.items()}


class Oracle:
    """Each adapter by hooks in transformers' model."""

    def __init__(self, zoo: Zoo, adapters: dict[str, Adapter]) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(zoo.base, dtype=torch.float32).eval()
        self._adapters = {zoo.revisions[name]: adapter for name, adapter in adapters.items()}

    @torch.no_grad()
    def logprobs(self, revision: str | None, texts: list[list[int]]) -> list[torch.Tensor]:
        """As `mixed.Oracle` does it."""
        longest = max(len(text) for text in texts)
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        adapter = Adapter(draft(KIND_LORA, "")) if revision is None else self._adapters[revision]
        found = adapter_reference.logits(self._model, adapter, ids).log_softmax(-1)
        return [row[: len(text)] for row, text in zip(found, texts, strict=True)]


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    torch.set_num_threads(1)
    return make_zoo(tmp_path, {"o-3": RECIPES["o-3"]})


def test_mixed_is_solo(zoo: Zoo) -> None:
    base = load_tiny(zoo.base)
    adapters, store = adapters_of(base), AdapterStore(zoo.store)
    del zoo.revisions["o-3"]
    zoo.revisions.update({name: store.commit(adapter) for name, adapter in adapters.items()})
    traffic, _ = Traffic.start(zoo, settings_for(zoo, quantize="none", max_slots=3))
    random_rounds(traffic, zoo, rounds=25)
    verdict = compare(traffic, Oracle(zoo, adapters), tie=1e-3, close=1e-3)  # type: ignore[arg-type]
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
