"""Reading a model's shape: both ways of writing rotary settings, defaults, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaplex_adapters.errors import StartupError
from adaplex_server.model.config import ModelConfig, parse_config, read_config
from adaplex_server.model.families import FAMILIES
from support.tiny_models import CONFIGS

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def parse(**changes: Any) -> ModelConfig:
    return parse_config(LLAMA | changes, {}, "m")


@pytest.mark.parametrize("kind", CONFIGS)
def test_says_what_transformers_says(kind: str, tmp_path: Path) -> None:
    theirs = CONFIGS[kind]()
    theirs.save_pretrained(tmp_path)
    ours = read_config(tmp_path)
    assert ours.name == tmp_path.name and FAMILIES[ours.family].model_type == theirs.model_type
    assert (ours.num_layers, ours.vocab_size) == (theirs.num_hidden_layers, theirs.vocab_size)
    assert (ours.hidden_size, ours.num_heads) == (theirs.hidden_size, theirs.num_attention_heads)
    assert ours.max_context == getattr(theirs, "max_position_embeddings", 2048)
    assert ours.tied_head == theirs.tie_word_embeddings
    rope = getattr(theirs, "rope_parameters", None)
    assert (ours.rope.kind == "none") == (rope is None or getattr(theirs, "alibi", False))
    if ours.rope.kind != "none":
        assert rope is not None
        full = rope.get("full_attention", rope)
        assert ours.rope.theta == full["rope_theta"]
        assert ours.rope.dim == int(ours.head_dim * full.get("partial_rotary_factor", 1.0))
        local = rope.get("sliding_attention")
        assert (ours.local_rope is None) == (local is None)
        assert ours.local_rope is None or (local and ours.local_rope.theta == local["rope_theta"])
    window = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * ours.num_layers
    assert ours.windows == tuple(window if name == "sliding_attention" else None for name in kinds)


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}},
        {"rope_theta": 500000.0, "rope_scaling": {("type" if k == "rope_type" else k): v for k, v in LLAMA3.items()}},
    ],
)
def test_both_ways_of_writing_rope(written: dict[str, Any]) -> None:
    rope = parse(**written).rope
    assert (rope.kind, rope.theta, rope.factor, rope.original_context) == ("llama3", 500000.0, 8.0, 8192)


def test_what_may_be_left_out() -> None:
    config = parse()
    assert (config.num_kv_heads, config.head_dim, config.rope.theta, config.activation) == (4, 16, 10000.0, "silu")
    assert config.dtype == "float32" and config.quantization is None and config.eos_token_ids == ()
    assert parse(torch_dtype="bfloat16").dtype == parse(dtype="bfloat16").dtype == "bfloat16"


def test_a_null_window_is_no_window() -> None:
    assert parse(model_type="mistral", num_key_value_heads=2, sliding_window=None).windows == (None,) * 3
    assert parse(model_type="mistral", num_key_value_heads=2).windows == (4096,) * 3
    assert parse(model_type="qwen2", sliding_window=8).windows == (None,) * 3
    old = parse(model_type="qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=1)
    assert old.windows == (None, 8, 8)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    qwen = parse(model_type="qwen3", sliding_window=8, use_sliding_window=True, layer_types=kinds)
    assert qwen.windows == (None, 8, None)


def test_end_tokens_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 128009, -1]}))
    assert read_config(tmp_path, "named").eos_token_ids == (2, 7)
    assert read_config(tmp_path, "named").name == "named"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "bert"}, "falcon, gemma, gemma2, gemma3_text, gpt2, gpt_neox, llama"),
        ({"model_type": None}, "unknown model family None"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "'ntk'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "short_factor"),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor has 1 values"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"hidden_act": "swiglu2"}, "'swiglu2'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "4 attention heads"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"model_type": "opt", "ffn_dim": 8, "do_layer_norm_before": False}, "do_layer_norm_before False"),
        ({"model_type": "opt", "ffn_dim": 8, "word_embed_proj_dim": 32}, "word_embed_proj_dim"),
        ({"model_type": "bloom", "apply_residual_connection_post_layernorm": True}, "post_layernorm True"),
        ({"model_type": "gpt2", "n_embd": 8, "n_head": 1, "n_layer": 1, "n_inner": -1}, "n_inner"),
        ({"model_type": "falcon", "multi_query": True, "parallel_attn": False}, "parallel_attn False"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(StartupError, match=told):
        parse(**changes)


def test_unreadable_folders(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(StartupError, match="cannot read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(StartupError, match="not an object"):
        read_config(tmp_path)


HUB: dict[str, dict[str, Any]] = {
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "polyglot-ko-12.8b": {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": 5120,
        "intermediate_size": 20480,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": 30080,
    },
    "falcon-7b": {
        "model_type": "falcon",
        "alibi": False,
        "bias": False,
        "hidden_size": 4544,
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
        "parallel_attn": True,
        "vocab_size": 65024,
    },
    "falcon-40b": {
        "model_type": "falcon",
        "alibi": False,
        "bias": False,
        "hidden_size": 8192,
        "new_decoder_architecture": True,
        "num_attention_heads": 128,
        "num_hidden_layers": 60,
        "num_kv_heads": 8,
        "parallel_attn": True,
        "vocab_size": 65024,
    },
    "bloom-560m": {
        "model_type": "bloom",
        "hidden_size": 1024,
        "n_layer": 24,
        "num_attention_heads": 16,
        "seq_length": 2048,
        "vocab_size": 250880,
    },
    "phi-3-mini-128k": {
        "model_type": "phi3",
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "su"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "vocab_size": 32064,
    },
}


def hub(name: str) -> ModelConfig:
    return parse_config(HUB[name], {}, name)


def test_gemma_3_as_it_was_written_before_transformers_5() -> None:
    config = hub("gemma-3-1b")
    assert config.windows == (512,) * 5 + (None, 512)
    assert config.local_rope is not None and (config.rope.theta, config.local_rope.theta) == (1e6, 1e4)
    assert (config.attention_scale, config.embedding_scale) == (256**-0.5, 1152**0.5)
    assert (config.tied_head, config.attention_softcap, config.logit_softcap) == (True, None, None)


def test_configs_of_other_families_as_the_hub_has_them() -> None:
    polyglot = hub("polyglot-ko-12.8b")
    assert (polyglot.rope.dim, polyglot.parallel_residual, polyglot.tied_head) == (64, True, False)
    assert polyglot.biased_linears == {"qkv", "o", "up", "down"}
    small, large = hub("falcon-7b"), hub("falcon-40b")
    assert (small.family, small.num_kv_heads, small.intermediate_size) == ("falcon-multi-query", 1, 4 * 4544)
    assert (large.family, large.num_kv_heads, large.rope.dim) == ("falcon-groups", 8, 64)
    bloom = hub("bloom-560m")
    assert (bloom.num_layers, bloom.num_heads, bloom.max_context, bloom.alibi_scale) == (24, 16, 2048, 1.0)
    phi = hub("phi-3-mini-128k")
    assert (phi.rope.kind, phi.rope.original_context, phi.rope.factor) == ("longrope", 4096, 32.0)
    assert phi.rope.attention_factor == pytest.approx(1.190238, abs=1e-6)


def test_the_first_gemmas_gelu_is_its_tanh_approximation() -> None:
    for written in ({"hidden_act": "gelu"}, {"hidden_act": "gelu", "hidden_activation": None}, {}):
        config = parse_config(
            {key: value for key, value in LLAMA.items() if key != "model_type"} | {"model_type": "gemma"} | written,
            {},
            "m",
        )
        assert (config.activation, config.head_dim, config.tied_head) == ("gelu_tanh", 256, True)
    assert parse(hidden_act="gelu").activation == "gelu"
