"""Mixed is solo for families that are not like Llama, each in another base format: random traffic with evictions,
preemptions, cancellations and shared prefixes, each row held against PEFT alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, Gemma2Config, OPTConfig, PreTrainedConfig

from support.mixed import VOCAB, Oracle, Traffic, compare, make_zoo, random_rounds, settings_for

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CASES: dict[str, tuple[Callable[[], PreTrainedConfig], str, list[str]]] = {
    "gemma2": (
        lambda: Gemma2Config(
            **_SHAPE,
            intermediate_size=128,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            sliding_window=20,
            initializer_range=0.15,
        ),
        "fp4",
        ["q_proj", "v_proj", "down_proj"],
    ),
    "bloom": (lambda: BloomConfig(**_SHAPE, initializer_range=0.15), "nf4", ["query_key_value", "dense_4h_to_h"]),
    "opt": (
        lambda: OPTConfig(**_SHAPE, ffn_dim=128, max_position_embeddings=256, init_std=0.15),
        "int8-absmax",
        ["k_proj", "fc1", "fc2"],
    ),
}


@pytest.mark.parametrize("family", CASES)
def test_mixed_is_solo(family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config, quantize, targets = CASES[family]
    recipes: dict[str, dict[str, Any]] = {
        f"rank{rank}-{part}": {"r": rank, "lora_alpha": 2 * rank, "target_modules": chosen}
        for rank, part, chosen in ((8, "all", targets), (1, "one", targets[:1]), (17, "last", targets[-1:]))
    }
    zoo = make_zoo(tmp_path, recipes, config=config())
    small = {"max_slots": 2, "quantize": quantize, "adapter_bytes": None, "kv_bytes": 11 * 16 * 2 * 2 * 4 * 16 * 4}
    traffic, base = Traffic.start(zoo, settings_for(zoo, **small))
    random_rounds(traffic, zoo, rounds=25)
    verdict = compare(traffic, Oracle(zoo, base, torch.device("cpu")), tie=1e-3, close=1e-3)
    stats = traffic.engine.stats()
    assert verdict.rows > 60 and stats.adapter_evictions > 5 and stats.prefix_hit_tokens > 0, (verdict, stats)
