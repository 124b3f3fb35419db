"""What each part of an adapter does, in plain torch: first by itself, then inside a model of transformers by hooks.

The oracle for the decoder where PEFT cannot be one (several parts at once, bottlenecks), and itself tested against
PEFT. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from adaplex_adapters.spec import Adapter, Bottleneck, LoraModule, Scale

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
}


def low_rank(x: torch.Tensor, module: LoraModule) -> torch.Tensor:
    """What a LoRA adds to a linear of x [..., in]: [..., out]."""
    return F.linear(F.linear(x, module.a.float()), module.b.float()) * module.scaling


def weight_norms(weight: torch.Tensor, module: LoraModule) -> torch.Tensor:
    """Lengths [out] of the rows of weight [out, in] (dequantized) with the LoRA added: a DoRA's divisors."""
    return torch.linalg.norm(weight.float() + module.scaling * (module.b.float() @ module.a.float()), dim=1)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, module: LoraModule | None, scale: Scale | None
) -> torch.Tensor:
    """An adapted linear: x [..., in], weight [out, in] (dequantized), bias [out]."""
    scaled = x * scale.vector.float() if scale is not None and scale.on == "input" else x
    product = F.linear(scaled, weight)
    if module is not None:
        product = product + low_rank(scaled, module)
        if module.magnitude is not None:
            product = product * (module.magnitude.float() / weight_norms(weight, module))
    if bias is not None:
        product = product + bias
    return product * scale.vector.float() if scale is not None and scale.on == "output" else product


def embedding(ids: torch.Tensor, rows: torch.Tensor, module: LoraModule) -> torch.Tensor:
    """rows [..., hidden]: the base's embeddings of ids [...]; the same with a LoRA of the embedding."""
    return rows + F.linear(module.a.float().T[ids], module.b.float()) * module.scaling


def bottleneck(stream: torch.Tensor, block: torch.Tensor, one: Bottleneck) -> torch.Tensor:
    """What is added to stream + block, [..., hidden] both: the stream before the block, and what the block gives."""
    x = {"block": block, "sum": stream + block, "stream": stream}[one.reads]
    inner = ACTIVATIONS[one.activation](F.linear(x, one.down.float(), one.down_bias.float()))
    return F.linear(inner, one.up.float(), one.up_bias.float()) * one.scaling


@torch.no_grad()
def logits(model: Any, adapter: Adapter, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits [batch, tokens, vocabulary] of ids [batch, tokens] with the adapter, without the virtual
    tokens' own. model: of transformers, dense; it is as it was afterwards.
    """
    with attached(model, adapter):
        if adapter.soft_prompt is not None:
            rows = model.get_input_embeddings()(ids)
            prompt = adapter.soft_prompt.to(rows.dtype).expand(len(ids), -1, -1)
            return model(inputs_embeds=torch.cat((prompt, rows), 1)).logits[:, prompt.shape[1] :]
        if adapter.prefix is not None:
            cache = DynamicCache(config=model.config)
            for layer, (keys, values) in enumerate(adapter.prefix):  # each [n, kv_heads, head_dim]
                cache.update(
                    keys.transpose(0, 1).expand(len(ids), -1, -1, -1),
                    values.transpose(0, 1).expand(len(ids), -1, -1, -1),
                    layer,
                )
            return model(ids, past_key_values=cache).logits
        return model(ids).logits


@contextmanager
def attached(model: Any, adapter: Adapter) -> Iterator[None]:
    """The model with the adapter's modules, factors, bottlenecks and replaced weights in it."""
    named = dict(model.named_modules())
    with ExitStack() as stack:
        for path in {*adapter.modules, *adapter.scales}:
            hook = _module_hook(adapter.modules.get(path), adapter.scales.get(path))
            stack.callback(named[path].register_forward_hook(hook).remove)
        for path, weight in adapter.replaced.items():
            stack.callback(named[path].register_forward_hook(_weight_hook(weight)).remove)
        _attach_bottlenecks(named, adapter, stack)
        yield


def _module_hook(module: LoraModule | None, scale: Scale | None) -> Callable[..., torch.Tensor]:
    def hook(layer: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, torch.nn.Embedding):
            assert module is not None and module.embedding
            # Gemma's embeddings are scaled as they are looked up, and so is what is added to them.
            factor = getattr(layer, "embed_scale", 1.0)
            return embedding(inputs[0], output / factor, module) * factor
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        return linear(inputs[0], weight, layer.bias, module, scale)

    return hook


def _weight_hook(weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    def hook(layer: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, torch.nn.Embedding):
            return F.embedding(inputs[0], weight) * getattr(layer, "embed_scale", 1.0)
        return F.linear(inputs[0], weight, layer.bias)

    return hook


# Of families whose layers are not of Llama's form, the last linear of each block.
_LAST_LINEARS = {
    "attention": ("attention.dense", "self_attention.dense", "self_attn.out_proj", "attn.c_proj"),
    "mlp": ("mlp.dense_4h_to_h", "fc2", "mlp.c_proj"),
}
_LAYERS = ("gpt_neox.layers", "model.decoder.layers", "transformer.h")


def _block_hook(one: Bottleneck) -> Callable[..., torch.Tensor]:
    def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output + bottleneck(torch.zeros_like(output), output, one)

    return hook


def _attach_bottlenecks(named: dict[str, Any], adapter: Adapter, stack: ExitStack) -> None:
    """A hook adds to the block's output, to which the model itself then adds the stream. Layers that are not of Llama's
    form do not give the stream away: there a bottleneck can read the block alone.
    """
    norms, blocks = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}, {"attention": "self_attn"}
    for (number, place), one in adapter.bottlenecks.items():
        layer, held = f"model.layers.{number}", {}
        if layer not in named:
            paths = [f"{layers}.{number}.{linear}" for layers in _LAYERS for linear in _LAST_LINEARS[place]]
            (path,) = [path for path in paths if path in named]
            assert one.reads == "block", path
            stack.callback(named[path].register_forward_hook(_block_hook(one)).remove)
            continue

        def before(_: Any, inputs: tuple[torch.Tensor], held: dict[str, torch.Tensor] = held) -> None:
            held["stream"] = inputs[0]

        def after(_: Any, __: Any, output: Any, held: dict[str, torch.Tensor] = held, one: Bottleneck = one) -> Any:
            block, *rest = output if isinstance(output, tuple) else (output,)
            changed = block + bottleneck(held["stream"], block, one)
            return (changed, *rest) if isinstance(output, tuple) else changed

        stack.callback(named[f"{layer}.{norms[place]}"].register_forward_pre_hook(before).remove)
        stack.callback(named[f"{layer}.{blocks.get(place, 'mlp')}"].register_forward_hook(after).remove)
