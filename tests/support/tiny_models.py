"""Small random checkpoints of every family, saved by transformers, and the same loaded for our decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from adaplex_server.model.base import Base, load_base
from adaplex_server.model.batch_builder import RowInput, build_batch
from adaplex_server.model.config import read_config
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.kv_cache import KvCache

CPU = torch.device("cpu")
PAGE_SIZE = 4
_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    # Larger than usual, so that attention is far from uniform and a wrong position or mask shows.
    "initializer_range": 0.3,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
}
_GEMMA: dict[str, Any] = {**_SHAPE, "head_dim": 32, "num_key_value_heads": 2, "pad_token_id": 0}


def _without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in _SHAPE.items() if key not in keys}


_FALCON = _without("intermediate_size")

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama2": lambda: LlamaConfig(**_SHAPE),
    "llama3": lambda: LlamaConfig(**_SHAPE, num_key_value_heads=2, rope_parameters=_LLAMA3),
    "llama-biases-tied": lambda: LlamaConfig(
        **_SHAPE,
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    ),
    "mistral": lambda: MistralConfig(**_SHAPE, num_key_value_heads=2, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**_SHAPE, num_key_value_heads=2, sliding_window=9),
    "qwen2": lambda: Qwen2Config(**_SHAPE, num_key_value_heads=2),
    "qwen2-windows": lambda: Qwen2Config(
        **_SHAPE, num_key_value_heads=2, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**_SHAPE, num_key_value_heads=2, head_dim=32),
    "gpt_neox": lambda: GPTNeoXConfig(**_SHAPE),
    "gpt_neox-sequential": lambda: GPTNeoXConfig(
        **_SHAPE,
        use_parallel_residual=False,
        hidden_act="gelu_new",
        rope_parameters={"rope_type": "default", "partial_rotary_factor": 1.0, "rope_theta": 1e4},
    ),
    "llama-yarn": lambda: LlamaConfig(**_SHAPE, rope_parameters=_YARN),
    "gemma": lambda: GemmaConfig(**_GEMMA, hidden_act="gelu"),
    "gemma2": lambda: Gemma2Config(
        **_GEMMA, sliding_window=9, query_pre_attn_scalar=24, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_GEMMA,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
        },
    ),
    "phi3": lambda: Phi3Config(**_SHAPE, num_key_value_heads=2, sliding_window=9, pad_token_id=0),
    "phi3-longrope": lambda: Phi3Config(
        **_SHAPE, original_max_position_embeddings=64, rope_parameters=_LONGROPE, pad_token_id=0
    ),
    "phi": lambda: PhiConfig(**_SHAPE, num_key_value_heads=2),
    "opt": lambda: OPTConfig(**_without("intermediate_size", "initializer_range"), ffn_dim=96, init_std=0.3),
    "opt-no-biases": lambda: OPTConfig(
        **_without("intermediate_size", "initializer_range"),
        ffn_dim=96,
        init_std=0.3,
        enable_bias=False,
        tie_word_embeddings=False,
        activation_function="gelu",
    ),
    "bloom": lambda: BloomConfig(vocab_size=97, hidden_size=64, n_layer=3, n_head=4, initializer_range=0.3),
    "bloom-6-heads": lambda: BloomConfig(vocab_size=97, hidden_size=48, n_layer=2, n_head=6, initializer_range=0.3),
    "gpt2": lambda: GPT2Config(
        vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=256, n_inner=96, initializer_range=0.3
    ),
    "falcon-multi-query": lambda: FalconConfig(**_FALCON),
    "falcon-groups": lambda: FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "falcon-groups-one-norm": lambda: FalconConfig(
        **_FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, ffn_hidden_size=96
    ),
    "falcon-alibi": lambda: FalconConfig(**_FALCON, multi_query=False, parallel_attn=False, alibi=True, bias=True),
}


def save_tiny(folder: Path, kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model of CONFIGS[kind] in float32, which is also saved to `folder`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # Norm weights of one and biases of zero would hide a mix-up.
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


def load_tiny(folder: Path, dtype: torch.dtype = torch.float32) -> Base:
    """The saved checkpoint as a dense base."""
    return load_base(
        folder, config=read_config(folder), quantize="none", double_quant=False, dtype=dtype, device=CPU, progress=None
    )


def allocate_kv(base: Base, pages: int) -> KvCache:
    """A cache of PAGE_SIZE tokens a page."""
    config = base.config
    return KvCache.allocate(
        config.num_layers, pages, PAGE_SIZE, config.num_kv_heads, config.head_dim, base.dtype, base.device
    )


def step(decoder: Decoder, kv: KvCache, rows: Sequence[RowInput]) -> list[torch.Tensor]:
    """One forward; each row's own logits."""
    logits = decoder.forward(build_batch(rows, kv.page_size, kv.keys[0].device), kv)
    return list(logits.split([row.logits for row in rows]))
