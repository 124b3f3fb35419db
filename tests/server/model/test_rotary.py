"""Rotary frequencies against transformers'."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from adaplex_server.model.config import RopeConfig
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
    torch.testing.assert_close(inverse_frequencies(rope), theirs.inv_freq, rtol=1e-6, atol=0)
    cos, sin = rotary_tables(rope, 300, torch.device("cpu"))
    their_cos, their_sin = theirs(torch.zeros(1), torch.arange(300)[None])
    torch.testing.assert_close(torch.cat((cos, cos), 1), their_cos[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat((sin, sin), 1), their_sin[0], rtol=0, atol=1e-4)
