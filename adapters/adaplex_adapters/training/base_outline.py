"""The sizes of a base and of an adapter on it, from config.json alone: the model is built without memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaplex_adapters.training.fused.decoder import can_fuse
from adaplex_adapters.training.methods.bottleneck import BottleneckAdapter
from adaplex_adapters.training.methods.peft_adapter import ia3_model, lora_model
from adaplex_adapters.training.options import BOTTLENECK, IA3, LORA, P_TUNING, PREFIX, TrainOptions


@dataclass(frozen=True)
class BaseOutline:
    """Counts of weights: in the layers' linears, everywhere else, in the largest linear, and trained ones.

    layer_outputs: out-features of a layer's linears; layer_adapted_inputs: in-features of those with an adapter.
    fused: whether a GPU takes the passes of `training.fused` with this adapter.
    """

    layers: int
    hidden: int
    vocabulary: int
    linear_weights: int
    other_weights: int
    largest_linear: int
    layer_outputs: int
    layer_adapted_inputs: int
    trained: int
    fused: bool

    def flops_a_token(self, options: TrainOptions, checkpointing: bool, length: int) -> float:
        """Forward, the gradient of the activations, and the forward again with checkpointing; the weights of the base
        have no gradient. Attention over half of `length` on average.
        """
        passes = 3 if checkpointing else 2
        attention = 2 * self.layers * self.hidden * length
        own = 6 * self.trained if options.method == LORA else 0
        return passes * (2 * self.linear_weights + attention) + own


def outline_base(folder: Path, options: TrainOptions) -> BaseOutline:
    """The outline of the base in `folder` with the adapter that the options ask for.

    Raises InvalidRequest where the adapter does not fit the base.
    """
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    linears: dict[str, Any] = {p: m for p, m in model.named_modules() if isinstance(m, torch.nn.Linear | _conv1d())}
    linears = {p: m for p, m in linears.items() if m is not model.get_output_embeddings()}
    sizes = {p: m.weight.numel() for p, m in linears.items()}
    everything = sum(p.numel() for p in model.parameters())
    layers = int(config.num_hidden_layers)
    trained, adapted = _trained(model, options)
    return BaseOutline(
        layers=layers,
        hidden=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        linear_weights=sum(sizes.values()),
        other_weights=everything - sum(sizes.values()),
        largest_linear=max(sizes.values()),
        layer_outputs=sum(_features(m)[1] for m in linears.values()) // layers,
        layer_adapted_inputs=sum(_features(linears[p])[0] for p in adapted if p in linears) // layers,
        trained=trained,
        fused=_is_fused(model, options),
    )


def _is_fused(model: Any, options: TrainOptions) -> bool:
    plain = options.method == LORA and not options.dora and options.dropout == 0 and not options.upcast_base
    return plain and options.precision in ("auto", "bf16") and can_fuse(model.base_model)


def _trained(model: Any, options: TrainOptions) -> tuple[int, tuple[str, ...]]:
    """How many weights the adapter has, and the paths of the linears that it adapts (empty where it adapts none)."""
    from accelerate import init_empty_weights

    if options.method in (LORA, IA3):
        with init_empty_weights():
            made = lora_model(model, options) if options.method == LORA else ia3_model(model, options)
        counted = sum(p.numel() for p in made.parameters() if p.requires_grad)
        return counted, tuple(p.removeprefix("base_model.model.") for p in made.targeted_module_names)
    if options.method == BOTTLENECK:
        made = BottleneckAdapter(model, options, torch.device("meta"))
        return sum(p.numel() for p in made.trained().values()), ()
    return _soft_prompt_weights(model.config, options), ()


def _soft_prompt_weights(config: Any, options: TrainOptions) -> int:
    hidden, count = int(config.hidden_size), options.virtual_tokens
    if options.method == P_TUNING:
        inner = options.encoder_hidden_size or hidden
        return count * hidden + (hidden + 1) * inner + (inner + 1) * inner + (inner + 1) * hidden
    if options.method == PREFIX:
        heads = int(config.num_attention_heads)
        width = hidden // heads * int(getattr(config, "num_key_value_heads", None) or heads)
        keys = 2 * int(config.num_hidden_layers) * width
        if not options.prefix_projection:
            return count * keys
        inner = options.encoder_hidden_size or hidden
        return count * width + (width + 1) * inner + (inner + 1) * keys
    return count * hidden


def _features(linear: Any) -> tuple[int, int]:
    """(in, out). GPT-2's Conv1D keeps its weight the other way round."""
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, torch.nn.Linear) else (rows, columns)


def _conv1d() -> type:
    from transformers.pytorch_utils import Conv1D

    found: type = Conv1D
    return found
