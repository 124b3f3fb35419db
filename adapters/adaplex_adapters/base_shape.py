"""What an adapter must fit: the shape of a base model, without its weights.

A `BaseShape` is computed from a base's config.json alone (by `adaplex_server.model.families`), so that adapters can be
checked without loading anything. It owns nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearShape:
    """Features of one linear as the checkpoint has it: weight is [out_features, in_features]."""

    out_features: int
    in_features: int


@dataclass(frozen=True)
class BaseShape:
    """The adaptable modules of a base.

    name: what the base is called ("smollm2-135m-instruct"); family: "llama", "qwen2", ...
    linears: Hugging Face module path ("model.layers.0.self_attn.q_proj") -> shape, in order of the forward pass.
    embedding, head: paths of the token embedding and of the head ("model.embed_tokens", "lm_head"), whose weights are
    [vocab_size, hidden_size]; tied_head: the head is the embedding's weight.
    num_kv_heads, head_dim: of the keys and values in each layer.
    """

    name: str
    family: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    linears: Mapping[str, LinearShape]
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    tied_head: bool = False
    num_kv_heads: int = 0
    head_dim: int = 0
