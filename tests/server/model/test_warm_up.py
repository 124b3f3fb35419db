"""Warming up runs every size of step that fits, on pages of its own."""

from __future__ import annotations

import pytest
import torch

from adaplex_server.model.batch import StepBatch
from adaplex_server.model.config import parse_config
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.kv_cache import KvCache
from adaplex_server.model.random_base import random_base
from adaplex_server.model.warm_up import warm_up

_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [(512, [1, 16, 24, 32, 48, 64, 96, 128, 160]), (40, [1, 16, 24, 32, 40]), (8, [1, 8])],
)
def test_steps_within_the_limit(max_tokens: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_base(parse_config(_CONFIG, {}, "tiny"), "none", dtype=torch.float32)
    seen: list[int] = []
    forward = Decoder.forward

    def watched(decoder: Decoder, batch: StepBatch, kv: KvCache) -> torch.Tensor:
        seen.append(len(batch.tokens))
        logits = forward(decoder, batch, kv)
        assert logits.isfinite().all()
        return logits

    monkeypatch.setattr(Decoder, "forward", watched)
    warm_up(Decoder(base, None, max_tokens), 16, max_tokens)
    assert seen == expected
