"""Adapters of every kind in a zoo's store, and transformers' model with each of them as the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from adaplex_adapters.identity import described
from adaplex_adapters.spec import KIND_LORA, Adapter, LoraModule, draft
from adaplex_adapters.store import AdapterStore
from adaplex_server.model.base import Base
from adaplex_server.model.families import base_shape
from support import adapter_reference
from support.mixed import Zoo
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


class KindsOracle:
    """Each adapter by hooks in transformers' model."""

    def __init__(self, zoo: Zoo, adapters: dict[str, Adapter]) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(zoo.base, dtype=torch.float32).eval()
        self._adapters = {zoo.revisions[name]: adapter for name, adapter in adapters.items()}

    @torch.no_grad()
    def logprobs(self, revision: str | None, texts: Sequence[list[int]]) -> list[torch.Tensor]:
        """As `mixed.Oracle` does it."""
        longest = max(len(text) for text in texts)
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        adapter = Adapter(draft(KIND_LORA, "")) if revision is None else self._adapters[revision]
        found = adapter_reference.logits(self._model, adapter, ids).log_softmax(-1)
        return [row[: len(text)] for row, text in zip(found, texts, strict=True)]


def with_kinds(zoo: Zoo) -> KindsOracle:
    """The zoo's adapters become one of every kind."""
    adapters, store = adapters_of(load_tiny(zoo.base)), AdapterStore(zoo.store)
    zoo.revisions.clear()
    zoo.revisions.update({name: store.commit(adapter) for name, adapter in adapters.items()})
    return KindsOracle(zoo, adapters)
