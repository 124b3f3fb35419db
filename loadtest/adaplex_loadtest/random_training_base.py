"""A transformers causal LM of any Llama shape with random NF4 weights, as bitsandbytes keeps them, made on the device
layer by layer: a base to measure training on where no real one is. Owns nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from adaplex_adapters.training.frozen_base import FrozenBase
from adaplex_loadtest.shapes import SHAPES

# Llama 65B.
_LARGE: dict[str, Any] = SHAPES["8b"] | {
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
}


def llama_fields(shape: str) -> dict[str, Any]:
    """config.json of a shape."""
    return dict(_LARGE if shape == "65b" else SHAPES[shape])


class NoTokenizer:
    """What training on random ids needs of a tokenizer."""

    pad_token_id = 0
    eos_token_id = 1


@torch.no_grad()
def random_base(shape: str, device: torch.device) -> FrozenBase:
    """Frozen, NF4 with double quantization; embedding and head in bfloat16."""
    import transformers
    from accelerate import init_empty_weights

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**llama_fields(shape))
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            model.set_submodule(path, _four_bit(module, device))
        elif isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            scale = 1.0 if isinstance(module, torch.nn.Embedding) else config.hidden_size**-0.5
            module.weight = _frozen(torch.randn(module.weight.shape, dtype=torch.bfloat16, device=device) * scale)
        elif "weight" in dict(module.named_parameters(recurse=False)):
            module.weight = _frozen(torch.ones(module.weight.shape, dtype=torch.bfloat16, device=device))
    model.tie_weights()
    model.to(device).requires_grad_(False)
    model.config.use_cache = False
    return FrozenBase(model, NoTokenizer(), f"random-{shape}", device)


def _four_bit(linear: torch.nn.Linear, device: torch.device) -> torch.nn.Module:
    """A linear whose outputs have the scale of its inputs."""
    import bitsandbytes

    columns, rows = linear.in_features, linear.out_features
    made = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, device="meta")
    weight = torch.randn(rows, columns, dtype=torch.bfloat16, device=device) * columns**-0.5
    settings = {"quant_type": "nf4", "compress_statistics": True, "module": made, "requires_grad": False}
    made.weight = bitsandbytes.nn.Params4bit(weight, **settings).to(device)
    made.support_avx512bf16_for_cpu = False
    return made


def _frozen(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values, requires_grad=False)
