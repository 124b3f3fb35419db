"""An adapter config for every kind that PEFT saves and we serve, for tiny Llamas."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

LLAMA_TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
PEFT_KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "lora": ("LoraConfig", {"r": 4, "lora_alpha": 3, "target_modules": LLAMA_TARGETS}),
        "lora head": ("LoraConfig", {"r": 2, "target_modules": ["q_proj", "lm_head"]}),
        "lora embedding": ("LoraConfig", {"r": 2, "lora_alpha": 5, "target_modules": ["embed_tokens", "v_proj"]}),
        "lora saved": ("LoraConfig", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        "dora": ("LoraConfig", {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": LLAMA_TARGETS}),
        "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": 5}),
        "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 24}),
        "p_tuning lstm": (
            "PromptEncoderConfig",
            {"num_virtual_tokens": 4, "encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM"},
        ),
        "prefix_tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
        "prefix_tuning projected": (
            "PrefixTuningConfig",
            {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 20},
        ),
        "vera": ("VeraConfig", {"r": 6, "target_modules": LLAMA_TARGETS}),
        "loha": ("LoHaConfig", {"r": 3, "alpha": 5, "target_modules": ["q_proj", "down_proj"]}),
        "lokr": ("LoKrConfig", {"r": 2, "alpha": 3, "target_modules": ["q_proj", "down_proj", "k_proj"]}),
        "lokr both": (
            "LoKrConfig",
            {"r": 2, "alpha": 3, "decompose_both": True, "target_modules": ["q_proj", "up_proj"]},
        ),
        "adalora": (
            "AdaLoraConfig",
            {"init_r": 4, "target_r": 2, "lora_alpha": 3, "total_step": 9, "target_modules": ["q_proj", "up_proj"]},
        ),
    }
)  # fmt: skip


def peft_config(name: str, changed: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The config of PEFT_KINDS, with some options changed."""
    import peft

    cls, options = PEFT_KINDS[name]
    return getattr(peft, cls)(task_type="CAUSAL_LM", **{**options, **changed})


def targets_of(name: str, model: Any) -> dict[str, Any]:
    """Options that name modules of this model where PEFT_KINDS names a Llama's."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    linears = [path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]
    last = sorted({path.rpartition(".")[2] for path in linears})
    if name.startswith(("prompt_tuning", "p_tuning", "prefix_tuning")):
        return {}
    if name == "ia3":
        return {"target_modules": last, "feedforward_modules": last[:1]}
    if name == "lora embedding":
        return {"target_modules": [next(path for path, m in model.named_modules() if m is embedding), last[0]]}
    return {"target_modules": [*last, *(["lm_head"] if name == "lora head" else [])]}
