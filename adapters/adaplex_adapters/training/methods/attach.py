"""From the options to fresh weights around a base: the one place that knows all methods."""

from __future__ import annotations

import random
from typing import Any

import torch

from adaplex_adapters.training.frozen_base import FrozenBase
from adaplex_adapters.training.methods.adapter import TrainedAdapter
from adaplex_adapters.training.methods.bottleneck import BottleneckAdapter
from adaplex_adapters.training.methods.first_weights import begin_with_lost_precision, begin_with_singular_values
from adaplex_adapters.training.methods.peft_adapter import PeftAdapter, ia3_model, lora_model
from adaplex_adapters.training.methods.soft_prompt import SoftPrompt, soft_prompt_model
from adaplex_adapters.training.options import BOTTLENECK, IA3, PREFIX, SOFT_PROMPTS, TrainOptions


def attach_adapter(base: FrozenBase, options: TrainOptions) -> TrainedAdapter:
    """Fresh float32 weights by the seed, in or beside `base.model`, which is otherwise unchanged.

    One adapter at a time: `detach` it before attaching the next.
    """
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    model = base.model
    if options.upcast_base:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    _set_checkpointing(model, wants_checkpointing(options, base.device))
    adapter = _fresh(model, base, options)
    for parameter in adapter.trained().values():
        assert parameter.dtype == torch.float32, parameter.dtype
    return adapter


def wants_checkpointing(options: TrainOptions, device: torch.device) -> bool:
    """Whether activations are computed again: what was asked, else on a GPU unless a prefix needs the cache."""
    if options.gradient_checkpointing is not None:
        return options.gradient_checkpointing
    return device.type == "cuda" and options.method != PREFIX


def _fresh(model: Any, base: FrozenBase, options: TrainOptions) -> TrainedAdapter:
    if options.method in SOFT_PROMPTS:
        return SoftPrompt(soft_prompt_model(model, base.tokenizer, options))
    if options.method == IA3:
        return PeftAdapter(ia3_model(model, options))
    if options.method == BOTTLENECK:
        return BottleneckAdapter(model, options, base.device)
    made = lora_model(model, options, "gaussian" if options.init == "gaussian" else True)
    if options.init == "pissa":
        begin_with_singular_values(made)
    if options.init == "loftq":
        begin_with_lost_precision(made, base.folder, base.form)
    return PeftAdapter(made)


def _set_checkpointing(model: Any, wanted: bool) -> None:
    # transformers has renamed it; versions from before know the older name alone.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if wanted:
        enable = getattr(model, f"{name}_checkpointing_enable")
        enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    elif getattr(model, f"is_{name}_checkpointing", False):
        getattr(model, f"{name}_checkpointing_disable")()
