"""What a read and validated adapter is, in memory: one type for every kind. These types own nothing and never change.

An adapter is a set of changes to a base, each of them exact and independent of the file that it came from: low-rank
additions to linears, factors on their inputs or outputs, vectors or keys and values before the prompt, small networks
after a block, whole weights in place of the base's. A kind is which of them an adapter has, and how it was saved.

Notation: `in` and `out` are the features of the adapted linear, `r` the rank of that module, n virtual tokens, m the
width of a bottleneck. Tensors are float32, bfloat16 or float16 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

KIND_LORA = "lora"
KIND_DORA = "dora"
KIND_ADALORA = "adalora"
KIND_LOHA = "loha"
KIND_LOKR = "lokr"
KIND_VERA = "vera"
KIND_IA3 = "ia3"
KIND_PROMPT_TUNING = "prompt_tuning"
KIND_P_TUNING = "p_tuning"
KIND_PREFIX_TUNING = "prefix_tuning"
KIND_BOTTLENECK = "bottleneck"
CONVERTED_KINDS = (KIND_ADALORA, KIND_LOHA, KIND_LOKR, KIND_VERA)
"""Kinds that are read as the low-rank modules that they are equal to, and kept as such."""

Side = Literal["input", "output"]
Place = Literal["attention", "mlp"]
Reads = Literal["block", "sum", "stream"]


@dataclass(frozen=True)
class AdapterSpec:
    """What one tells about an adapter without its tensors.

    revision: SHA-256 (hex) over the normalized content; the adapter's only identity.
    rank: the largest rank of any module, 0 without low-rank modules. targets: last parts of the adapted module paths,
    sorted ("k_proj", ...); of a bottleneck its places ("attention", "mlp").
    parameters: number of trained scalars. nbytes: their size as stored.
    base_model: `base_model_name_or_path` as the config states it (information only).
    virtual_tokens: n of a soft prompt or a prefix. bottleneck_size: the largest m.
    """

    revision: str
    kind: str
    rank: int
    targets: tuple[str, ...]
    parameters: int
    nbytes: int
    base_model: str
    virtual_tokens: int = 0
    bottleneck_size: int = 0


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear: y += scaling * B (A x). a: [r, in], b: [out, r].

    scaling is alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023), with the patterns already applied.
    magnitude: [out], with DoRA (Liu et al. 2024): with W the base's dequantized weight [out, in] and norm(o) the length
    of row o of W + scaling * B A, output o becomes magnitude(o) / norm(o) * (W x + scaling * B A x)(o), and the bias is
    added after that.
    embedding: the module is the base's embedding: x is one-hot in the token, `in` the vocabulary, and the row that the
    token gets has scaling * B A[:, token] added. Otherwise a linear, the head among them.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    embedding: bool = False


@dataclass(frozen=True)
class Scale:
    """A factor for each feature of a linear (IA3, Liu et al. 2022).

    vector: [in] when on "input": y = W (x * vector) + b; [out] when on "output": y = (W x + b) * vector, bias included.
    """

    vector: torch.Tensor
    on: Side


@dataclass(frozen=True)
class Bottleneck:
    """A small network beside a block (Houlsby et al. 2019, Pfeiffer et al. 2020): f(x) = scaling * (up act(down x)).

    down: [m, hidden], down_bias: [m], up: [hidden, m], up_bias: [hidden]; scaling: [1] or [hidden], float32.
    activation: a value of `bottleneck_config.ACTIVATIONS`. With s the residual stream before the block (before its
    norm) and h what the block gives to it, the stream after the block is s + h + f(x), where x is h ("block", Houlsby),
    s + h ("sum", Pfeiffer) or s ("stream", parallel).
    """

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    activation: str
    scaling: torch.Tensor
    reads: Reads


@dataclass(frozen=True)
class Adapter:
    """A whole adapter. Paths are of the base's modules ("model.layers.0.self_attn.q_proj").

    modules, scales: by path of the linear. soft_prompt: [n, hidden], what stands where the embeddings of n tokens
    before the prompt would. prefix: [layers, 2, n, kv_heads, head_dim], the keys (0) and values (1) of n tokens before
    the prompt as attention sees them, so that no rotation and no norm is applied to them.
    bottlenecks: by (layer, place). replaced: path of the head or embedding -> the weight [vocab, hidden] that stands
    in for the base's there and nowhere else (a head that is tied to the embedding is replaced alone).
    base_copies: path of the head or embedding -> what the adapter claims the base's weight to be, since PEFT saves it
    beside; an adapter whose copy differs from the base's was made for another base.
    """

    spec: AdapterSpec
    modules: Mapping[str, LoraModule] = field(default_factory=dict)
    scales: Mapping[str, Scale] = field(default_factory=dict)
    soft_prompt: torch.Tensor | None = None
    prefix: torch.Tensor | None = None
    bottlenecks: Mapping[tuple[int, Place], Bottleneck] = field(default_factory=dict)
    replaced: Mapping[str, torch.Tensor] = field(default_factory=dict)
    base_copies: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def is_plain_lora(self) -> bool:
        """Whether low-rank additions to linears are all that it is."""
        beside = self.scales or self.bottlenecks or self.replaced or self.base_copies
        if beside or self.soft_prompt is not None or self.prefix is not None:
            return False
        return all(module.magnitude is None and not module.embedding for module in self.modules.values())

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(what it is, in words, tensor) of every tensor, in an order that follows from the content alone."""
        for path in sorted(self.modules):
            module = self.modules[path]
            yield f"lora_A of {path}", module.a
            yield f"lora_B of {path}", module.b
            if module.magnitude is not None:
                yield f"magnitude of {path}", module.magnitude
        for path in sorted(self.scales):
            yield f"factor of {path}", self.scales[path].vector
        if self.soft_prompt is not None:
            yield "soft prompt", self.soft_prompt
        if self.prefix is not None:
            yield "prefix", self.prefix
        for layer, place in sorted(self.bottlenecks):
            bottleneck = self.bottlenecks[layer, place]
            for name in ("down", "down_bias", "up", "up_bias", "scaling"):
                yield f"{name} of layer {layer}'s {place} bottleneck", getattr(bottleneck, name)
        for path in sorted(self.replaced):
            yield f"weight of {path}", self.replaced[path]
        for path in sorted(self.base_copies):
            yield f"base weight of {path}", self.base_copies[path]


def draft(kind: str, base_model: str) -> AdapterSpec:
    """The spec of an adapter whose content is still to be described (by `identity.described`)."""
    return AdapterSpec("", kind, 0, (), 0, 0, base_model)
