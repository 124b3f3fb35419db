"""The forward pass of a Llama-like decoder for training: no cache, no mask but causality. Whatever else is asked for
goes the way of transformers.

Owns nothing but its place as the decoder's `forward`. Modules are read anew in each pass, since adapters come and go.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from adaplex_adapters.training.fused.adapted import Adapted, read_adapted
from adaplex_adapters.training.fused.halves import Pair, halves
from adaplex_adapters.training.fused.pointwise import AddNorm, Norm, Rotary
from adaplex_adapters.training.fused.projection import gated_down, project

FAMILIES = ("LlamaModel", "MistralModel", "Qwen2Model")
"""Decoders of transformers that compute what `_layer` computes."""

_STILL_ANGLES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles do not depend on how long the sequence is."""


@dataclass(frozen=True)
class _Layer:
    """linears: in the order of `_modules`, what is known of each; None: a module to be called as it is. pairs: their
    LoRAs for one pass.
    """

    module: Any
    linears: tuple[Adapted | None, ...]
    pairs: tuple[Pair, ...] = ()

    @property
    def known(self) -> bool:
        """Whether no module of it is called."""
        return None not in self.linears

    def apply(self, x: torch.Tensor, which: slice) -> tuple[torch.Tensor, ...]:
        """x through neighbouring linears."""
        parts = [part for part in self.linears[which] if part is not None]
        modules = _modules(self.module)[which]
        if len(parts) == len(modules):
            return project(x, parts, self.pairs[which])
        return tuple(module(x) for module in modules)


class _Recomputation:
    """Whether a layer runs for the second time, for the sake of what its gradient needs."""

    def __init__(self) -> None:
        self.under_way = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.under_way = True
        try:
            yield
        finally:
            self.under_way = False


class FusedDecoder:
    """Stands in for the `forward` of a transformers decoder."""

    def __init__(self, decoder: Any) -> None:
        self._decoder, self._usual = decoder, decoder.forward

    def __call__(self, *given: Any, **named: Any) -> Any:
        """As the decoder's own; last_hidden_state is all that there is of the result."""
        wanted = {key: value for key, value in named.items() if value is not None and value is not False}
        inputs = wanted.pop("inputs_embeds", None)
        ids = wanted.pop("input_ids", None)
        if given or wanted or (ids is None) == (inputs is None):
            return self._usual(*given, **named)
        layers = self.layers()
        if layers is None:
            return self._usual(*given, **named)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        h = self._decoder.embed_tokens(ids) if inputs is None else inputs.to(self._decoder.embed_tokens.weight.dtype)
        return BaseModelOutputWithPast(last_hidden_state=self._run(h, layers))

    def layers(self) -> list[_Layer] | None:
        """The layers as they stand; None where something hangs on them that this pass knows nothing of."""
        decoder = self._decoder
        dtype = decoder.embed_tokens.weight.dtype
        device = decoder.embed_tokens.weight.device.type
        # Without autocast a LoRA multiplies in float32, whatever the base does.
        wanted = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        if dtype != wanted:
            return None
        modules = list(decoder.layers)
        inner = itertools.chain.from_iterable(
            (m, m.self_attn, m.mlp, m.input_layernorm, m.post_attention_layernorm) for m in modules
        )
        if decoder.norm.weight.dtype != dtype or any(m._forward_hooks or m._forward_pre_hooks for m in inner):
            return None
        return [_Layer(module, tuple(map(read_adapted, _modules(module)))) for module in modules]

    def _run(self, h: torch.Tensor, layers: list[_Layer]) -> torch.Tensor:
        decoder = self._decoder
        layers = _with_pairs(layers, h.dtype)
        positions = torch.arange(h.shape[1], device=h.device)[None]
        cos, sin = (angle[0].contiguous() for angle in decoder.rotary_emb(h, position_ids=positions))
        again = decoder.training and getattr(layers[0].module, "gradient_checkpointing", False)
        for layer in layers:
            if again and torch.is_grad_enabled():
                second = _Recomputation()
                h = checkpoint(
                    partial(_layer, layer, second), h, cos, sin, use_reentrant=False, determinism_check="none",
                    preserve_rng_state=not layer.known, context_fn=partial(_contexts, second),
                )  # fmt: skip
            else:
                h = _layer(layer, None, h, cos, sin)
        found: torch.Tensor = Norm.apply(h, decoder.norm.weight, decoder.norm.variance_epsilon)
        return found


def fuse(causal: Any) -> bool:
    """Let the decoder inside a causal LM run so, where it is of a family that can. Returns whether it does."""
    decoder = causal.base_model
    if isinstance(decoder.forward, FusedDecoder):
        return True
    fits = can_fuse(decoder)
    if fits:
        decoder.forward = FusedDecoder(decoder)
    return fits


def can_fuse(decoder: Any) -> bool:
    """Whether a decoder computes what this pass computes."""
    config = decoder.config
    return (
        type(decoder).__name__ in FAMILIES
        and getattr(config, "hidden_act", None) == "silu"
        and getattr(config, "sliding_window", None) is None
        and not getattr(config, "attention_dropout", 0.0)
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and getattr(decoder.rotary_emb, "rope_type", "default") in _STILL_ANGLES
    )


def fused_decoder(causal: Any) -> FusedDecoder | None:
    """The one inside a causal LM."""
    found = getattr(causal.base_model, "forward", None)
    return found if isinstance(found, FusedDecoder) else None


def _contexts(second: _Recomputation) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), second()


_ATTENTION, _OUT, _MLP, _DOWN = slice(0, 3), slice(3, 4), slice(4, 6), 6


def _modules(module: Any) -> tuple[Any, ...]:
    """The linears of a layer, in the order of the slices above."""
    a, mlp = module.self_attn, module.mlp
    return a.q_proj, a.k_proj, a.v_proj, a.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _with_pairs(layers: list[_Layer], dtype: torch.dtype) -> list[_Layer]:
    """With all LoRAs in `dtype`, made at once."""
    pairs = iter(halves([None if part is None else part.lora for layer in layers for part in layer.linears], dtype))
    return [replace(layer, pairs=tuple(itertools.islice(pairs, len(layer.linears)))) for layer in layers]


def _layer(
    layer: _Layer, second: _Recomputation | None, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """h: [rows, L, hidden] through attention and MLP."""
    module = layer.module
    first, next_ = module.input_layernorm, module.post_attention_layernorm
    x = Norm.apply(h, first.weight, first.variance_epsilon)
    q, k, v = layer.apply(x, _ATTENTION)
    (delta,) = layer.apply(_attention(q, k, v, module.self_attn, cos, sin), _OUT)
    h, x = AddNorm.apply(h, delta, next_.weight, next_.variance_epsilon)
    gate, up = layer.apply(x, _MLP)
    down = layer.linears[_DOWN]
    if down is None:
        return h + module.mlp.down_proj(F.silu(gate) * up)
    return h + gated_down(gate, up, down, layer.pairs[_DOWN], second is not None and second.under_way)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Any, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    heads = (*q.shape[:-1], -1, attention.head_dim)
    q, k = (Rotary.apply(part.view(heads), cos, sin).transpose(1, 2) for part in (q, k))
    mixed = F.scaled_dot_product_attention(
        q, k, v.view(heads).transpose(1, 2), is_causal=True, scale=attention.scaling, enable_gqa=True
    )
    return mixed.transpose(1, 2).reshape(*mixed.shape[:1], mixed.shape[2], -1)
