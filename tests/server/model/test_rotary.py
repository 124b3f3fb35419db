"""Rotary frequencies against transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from adaplex_server.model.config import parse_config
from adaplex_server.model.rope_config import NO_ROPE, RopeConfig
from adaplex_server.model.rotary import inverse_frequencies, rotary_tables

ROPES = [
    RopeConfig("default", 10000.0, 64),
    RopeConfig("linear", 10000.0, 64, factor=4.0),
    RopeConfig("llama3", 500000.0, 64, 8.0, 1.0, 4.0, 8192),
    RopeConfig("llama3", 1000.0, 64, 32.0, 2.0, 8.0, 64),
]


@pytest.mark.parametrize("rope", ROPES)
def test_equals_transformers(rope: RopeConfig) -> None:
    parameters = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        parameters["original_max_position_embeddings"] = rope.original_context
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=parameters
    )
    theirs = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(inverse_frequencies(rope, 300), theirs.inv_freq, rtol=1e-6, atol=0)
    cos, sin = rotary_tables(rope, 300, torch.device("cpu"))
    their_cos, their_sin = theirs(torch.zeros(1), torch.arange(300)[None])
    torch.testing.assert_close(torch.cat((cos, cos), 1), their_cos[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat((sin, sin), 1), their_sin[0], rtol=0, atol=1e-4)


FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [3.0, 4.0, 5.0, 6.0]}
WRITTEN: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn without a factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32},
    "yarn, all set": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 128,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 4.0} | FACTORS,
    "longrope without a factor": {"rope_type": "longrope", "original_max_position_embeddings": 64} | FACTORS,
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.parametrize("length", [50, 256])
def test_scaled_as_transformers_scales(case: str, length: int) -> None:
    """length: of a context that is short or longer than the original one."""
    raw: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 9,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
    }
    written = WRITTEN[case] | {"rope_theta": 500.0}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(**{k: v for k, v in raw.items() if k != "model_type"}, rope_parameters=dict(written))
    )
    their_cos, their_sin = theirs(torch.zeros(1), torch.arange(length)[None])
    cos, sin = rotary_tables(
        parse_config(raw | {"rope_parameters": written}, {}, "m").rope, length, torch.device("cpu")
    )
    torch.testing.assert_close(torch.cat((cos, cos), 1), their_cos[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat((sin, sin), 1), their_sin[0], rtol=0, atol=1e-4)


def test_nothing_turns_without_rotary_positions() -> None:
    cos, sin = rotary_tables(NO_ROPE, 9, torch.device("cpu"))
    assert bool((cos == 1).all()) and bool((sin == 0).all())
