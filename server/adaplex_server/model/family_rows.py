"""The model families that are served, one row each (`model.family` says what the fields mean)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaplex_server.model.family import Family, frozen

_LLAMA_LINEARS = frozen(
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    o=("self_attn.o_proj",),
    gate_up=("mlp.gate_proj", "mlp.up_proj"),
    down=("mlp.down_proj",),
)
_LLAMA_NORMS = frozen(attention="input_layernorm", mlp="post_attention_layernorm")
_LLAMA_DEFAULTS: Mapping[str, Any] = frozen(
    hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10_000.0, tie_word_embeddings=False, max_position_embeddings=2048
)
_QWEN_DEFAULTS = frozen(
    _LLAMA_DEFAULTS,
    max_position_embeddings=32768,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
)
_GEMMA_NORMS = frozen(
    attention="input_layernorm",
    after_attention="post_attention_layernorm",
    mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_GEMMA_DEFAULTS = frozen(
    _LLAMA_DEFAULTS,
    hidden_activation="gelu_pytorch_tanh",
    tie_word_embeddings=True,
    max_position_embeddings=8192,
    head_dim=256,
)


def _llama_like(name: str, **changes: Any) -> Family:
    """A row that has Llama's module names."""
    row: dict[str, Any] = {
        "name": name,
        "model_type": name,
        "norm": "rms",
        "gated": True,
        "qkv_layout": "blocks",
        "embedding": "model.embed_tokens",
        "head": "lm_head",
        "final_norm": "model.norm",
        "layer": "model.layers.{}",
        "linears": _LLAMA_LINEARS,
        "norms": _LLAMA_NORMS,
        "defaults": _LLAMA_DEFAULTS,
    }
    return Family(**(row | changes))


def _gemma_like(name: str, **changes: Any) -> Family:
    """A row with what all Gemmas share."""
    row: dict[str, Any] = {
        "norm_offset": 1.0,
        "scaled_embedding": True,
        "keys": frozen(hidden_act=("hidden_activation", "hidden_act")),
        "required": frozen(use_bidirectional_attention=False),
        "biases": frozen(qkv="attention_bias", o="attention_bias"),
    }
    return _llama_like(name, **(row | changes))


def _falcon(name: str, **changes: Any) -> Family:
    """One of Falcon's architectures."""
    row: dict[str, Any] = {
        "name": name,
        "model_type": "falcon",
        "norm": "layer",
        "gated": False,
        "embedding": "transformer.word_embeddings",
        "head": "lm_head",
        "final_norm": "transformer.ln_f",
        "layer": "transformer.h.{}",
        "linears": frozen(
            qkv=("self_attention.query_key_value",),
            o=("self_attention.dense",),
            up=("mlp.dense_h_to_4h",),
            down=("mlp.dense_4h_to_h",),
        ),
        "biases": frozen(qkv="bias", o="bias", up="bias", down="bias"),
        "alibi": "alibi",
        "alibi_scaled": True,
        "inner": 4,
        "keys": frozen(
            norm_eps=("layer_norm_epsilon",),
            hidden_act=("activation",),
            intermediate_size=("ffn_hidden_size",),
            hidden_size=("hidden_size", "n_embed"),
            num_hidden_layers=("num_hidden_layers", "n_layer"),
            num_attention_heads=("num_attention_heads", "n_head"),
            num_key_value_heads=("num_kv_heads",),
        ),
        "defaults": frozen(
            activation="gelu",
            layer_norm_epsilon=1e-5,
            rope_theta=10_000.0,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            new_decoder_architecture=False,
            multi_query=True,
            parallel_attn=True,
        ),
    }
    return Family(**(row | changes))


_GPT_NEOX = Family(
    name="gpt_neox",
    model_type="gpt_neox",
    norm="layer",
    gated=False,
    parallel="use_parallel_residual",
    qkv_layout="heads",
    embedding="gpt_neox.embed_in",
    head="embed_out",
    final_norm="gpt_neox.final_layer_norm",
    layer="gpt_neox.layers.{}",
    linears=frozen(
        qkv=("attention.query_key_value",),
        o=("attention.dense",),
        up=("mlp.dense_h_to_4h",),
        down=("mlp.dense_4h_to_h",),
    ),
    norms=_LLAMA_NORMS,
    biases=frozen(qkv="attention_bias", o="attention_bias", up=True, down=True),
    keys=frozen(norm_eps=("layer_norm_eps",), rope_theta=("rotary_emb_base",), partial_rotary_factor=("rotary_pct",)),
    defaults=frozen(
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        rotary_emb_base=10_000.0,
        rotary_pct=0.25,
        tie_word_embeddings=False,
        use_parallel_residual=True,
        attention_bias=True,
        max_position_embeddings=2048,
    ),
)

_OPT = Family(
    name="opt",
    model_type="opt",
    required=frozen(do_layer_norm_before=True, _remove_final_layer_norm=False, layer_norm_elementwise_affine=True),
    norm="layer",
    gated=False,
    qkv_layout="blocks",
    embedding="model.decoder.embed_tokens",
    head="lm_head",
    final_norm="model.decoder.final_layer_norm",
    layer="model.decoder.layers.{}",
    linears=frozen(
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        o=("self_attn.out_proj",),
        up=("fc1",),
        down=("fc2",),
    ),
    norms=frozen(attention="self_attn_layer_norm", mlp="final_layer_norm"),
    biases=frozen(qkv="enable_bias", o="enable_bias", up="enable_bias", down="enable_bias"),
    positions="model.decoder.embed_positions",
    position_offset=2,
    keys=frozen(norm_eps=("layer_norm_eps",), hidden_act=("activation_function",), intermediate_size=("ffn_dim",)),
    defaults=frozen(
        activation_function="relu",
        layer_norm_eps=1e-5,
        enable_bias=True,
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        layer_norm_elementwise_affine=True,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
)

_BLOOM = Family(
    name="bloom",
    model_type="bloom",
    required=frozen(apply_residual_connection_post_layernorm=False),
    norm="layer",
    gated=False,
    qkv_layout="heads",
    embedding="transformer.word_embeddings",
    head="lm_head",
    final_norm="transformer.ln_f",
    layer="transformer.h.{}",
    linears=frozen(
        qkv=("self_attention.query_key_value",),
        o=("self_attention.dense",),
        up=("mlp.dense_h_to_4h",),
        down=("mlp.dense_4h_to_h",),
    ),
    norms=_LLAMA_NORMS,
    biases=frozen(qkv=True, o=True, up=True, down=True),
    embedding_norm="transformer.word_embeddings_layernorm",
    alibi=True,
    inner=4,
    keys=frozen(
        norm_eps=("layer_norm_epsilon",),
        hidden_size=("hidden_size", "n_embed"),
        num_hidden_layers=("n_layer", "num_hidden_layers"),
        num_attention_heads=("n_head", "num_attention_heads"),
        max_position_embeddings=("seq_length",),
    ),
    defaults=frozen(
        hidden_act="gelu_new",
        layer_norm_epsilon=1e-5,
        seq_length=2048,
        tie_word_embeddings=True,
        apply_residual_connection_post_layernorm=False,
    ),
)

_GPT2 = Family(
    name="gpt2",
    model_type="gpt2",
    required=frozen(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
    norm="layer",
    gated=False,
    qkv_layout="blocks",
    embedding="transformer.wte",
    head="lm_head",
    final_norm="transformer.ln_f",
    layer="transformer.h.{}",
    linears=frozen(qkv=("attn.c_attn",), o=("attn.c_proj",), up=("mlp.c_fc",), down=("mlp.c_proj",)),
    norms=frozen(attention="ln_1", mlp="ln_2"),
    biases=frozen(qkv=True, o=True, up=True, down=True),
    transposed=True,
    positions="transformer.wpe",
    inner=4,
    keys=frozen(
        norm_eps=("layer_norm_epsilon",),
        hidden_act=("activation_function",),
        hidden_size=("n_embd",),
        num_hidden_layers=("n_layer",),
        num_attention_heads=("n_head",),
        intermediate_size=("n_inner",),
        max_position_embeddings=("n_positions", "n_ctx"),
    ),
    defaults=frozen(
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        n_positions=1024,
        tie_word_embeddings=True,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    ),
)

ROWS = (
    _llama_like("llama", biases=frozen(qkv="attention_bias", o="attention_bias", gate_up="mlp_bias", down="mlp_bias")),
    _llama_like(
        "mistral",
        defaults=frozen(_LLAMA_DEFAULTS, max_position_embeddings=131072, sliding_window=4096, num_key_value_heads=8),
    ),
    _llama_like("qwen2", biases=frozen(qkv=True), defaults=_QWEN_DEFAULTS),
    _llama_like(
        "qwen3",
        norms=frozen(_LLAMA_NORMS, q="self_attn.q_norm", k="self_attn.k_norm"),
        biases=frozen(qkv="attention_bias", o="attention_bias"),
        defaults=frozen(_QWEN_DEFAULTS, head_dim=128),
    ),
    _gemma_like("gemma", gelu_is_tanh=True, defaults=frozen(_GEMMA_DEFAULTS)),
    _gemma_like(
        "gemma2",
        norms=_GEMMA_NORMS,
        window_every=2,
        defaults=frozen(
            _GEMMA_DEFAULTS,
            query_pre_attn_scalar=256,
            sliding_window=4096,
            final_logit_softcapping=30.0,
            attn_logit_softcapping=50.0,
        ),
    ),
    _gemma_like(
        "gemma3_text",
        norms=frozen(_GEMMA_NORMS, q="self_attn.q_norm", k="self_attn.k_norm"),
        window_every=6,
        defaults=frozen(
            _GEMMA_DEFAULTS,
            query_pre_attn_scalar=256,
            sliding_window=4096,
            max_position_embeddings=131072,
            rope_theta=1_000_000.0,
            rope_local_base_freq=10_000.0,
        ),
    ),
    _llama_like(
        "phi3",
        linears=frozen(
            qkv=("self_attn.qkv_proj",),
            o=("self_attn.o_proj",),
            gate_up=("mlp.gate_up_proj",),
            down=("mlp.down_proj",),
        ),
        defaults=frozen(_LLAMA_DEFAULTS, rms_norm_eps=1e-5, max_position_embeddings=4096),
    ),
    _llama_like(
        "phi",
        required=frozen(qk_layernorm=False),
        norm="layer",
        gated=False,
        parallel=True,
        final_norm="model.final_layernorm",
        linears=frozen(
            qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            o=("self_attn.dense",),
            up=("mlp.fc1",),
            down=("mlp.fc2",),
        ),
        norms=frozen(attention="input_layernorm"),
        biases=frozen(qkv=True, o=True, up=True, down=True),
        head_bias=True,
        keys=frozen(norm_eps=("layer_norm_eps",)),
        defaults=frozen(
            hidden_act="gelu_new",
            layer_norm_eps=1e-5,
            rope_theta=10_000.0,
            partial_rotary_factor=0.5,
            tie_word_embeddings=False,
            qk_layernorm=False,
            max_position_embeddings=2048,
        ),
    ),
    _GPT_NEOX,
    _OPT,
    _BLOOM,
    _GPT2,
    _falcon(
        "falcon-groups-one-norm",
        when=frozen(new_decoder_architecture=True, num_ln_in_parallel_attn=1),
        required=frozen(parallel_attn=True),
        parallel=True,
        qkv_layout="groups",
        norms=frozen(attention="input_layernorm"),
    ),
    _falcon(
        "falcon-groups",
        when=frozen(new_decoder_architecture=True),
        required=frozen(parallel_attn=True),
        parallel=True,
        qkv_layout="groups",
        norms=frozen(attention="ln_attn", mlp="ln_mlp"),
    ),
    _falcon(
        "falcon-multi-query",
        when=frozen(multi_query=True),
        required=frozen(parallel_attn=True),
        parallel=True,
        qkv_layout="blocks",
        multi_query=True,
        norms=frozen(attention="input_layernorm"),
    ),
    _falcon("falcon", required=frozen(parallel_attn=False), qkv_layout="heads", norms=_LLAMA_NORMS),
)
