"""What one model family is to the decoder: a row of facts. The rows are in `model.family_rows`, and what follows from a
row and a config in `model.families`.

A family says where a checkpoint keeps each thing and how a layer is put together; nothing here runs. Another family
is another row, and a new field only where the decoder learns something new. Module names are those of transformers,
which PEFT's adapters use too.

Notation: a `linear` is one of the decoder's hot-path linears ("qkv", "o", "gate_up" or "up", "down"), perhaps several
modules of the checkpoint fused along out-features; a `norm` is "attention" or "mlp" (before that block),
"after_attention" or "after_mlp" (of the block's result, before it is added), "q" or "k" (over each head).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

QkvLayout = Literal["blocks", "heads", "groups"]


def frozen(base: Mapping[str, Any] = MappingProxyType({}), **items: Any) -> Mapping[str, Any]:
    """`base` with `items` added or replaced, read-only."""
    return MappingProxyType({**base, **items})


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row. A switch is True, False, or the config key that says which.

    name: ours, a key of FAMILIES. model_type: as config.json states it. when: config keys and values that choose this
    row among those of a model_type, the first that fits. required: config keys and the one value that is served.

    norm: "rms" (weight only) or "layer" (weight and bias, mean removed). norm_offset: what is added to every norm's
    weight (a family whose norms multiply by 1 + weight stores the weight). gated: down(act(gate) * up) instead of
    down(act(up)). parallel: a switch; attention and MLP both read the layer's input, and the MLP reads what attention
    reads where there is no "mlp" norm.
    qkv_layout: "blocks" has all q heads, then all k heads, then all v heads in the outputs of "qkv"; "heads" has (q,
    k, v) of head 0, then of head 1, ...; "groups" has the q heads of key-value head 0, its k, its v, then the next.
    multi_query: one key-value head, whatever the config says.

    embedding, head, final_norm, layer: module paths; `layer` is formatted with the number and prefixes what follows.
    linears: linear -> module paths in the layer, in fused order. norms: norm -> module path in the layer.
    biases: linear -> switch, or absent for none. head_bias: the head has one. transposed: the checkpoint's linears are
    [in, out] (GPT-2's Conv1D).
    scaled_embedding: embeddings are multiplied by sqrt(hidden_size). embedding_norm: path of a norm over embeddings.
    positions: path of learned position embeddings, whose entry 0 is for position -position_offset. alibi: a switch;
    attention scores are biased by distance; alibi_scaled: the bias is multiplied by the scale of the scores, too.
    A family without learned positions and ALiBi is rotary.

    keys: our name -> config.json's, in order of precedence, where they differ. defaults: values of config.json's keys
    that may be left out (transformers' own defaults). inner: intermediate_size in multiples of hidden_size, where
    config.json leaves it out. window_every: n where every n-th layer has full attention and the others the window,
    unless config.json says it layer by layer. gelu_is_tanh: "gelu" means its tanh approximation.
    """

    name: str
    model_type: str
    when: Mapping[str, Any] = field(default_factory=frozen)
    required: Mapping[str, Any] = field(default_factory=frozen)
    norm: Literal["rms", "layer"]
    norm_offset: float = 0.0
    gated: bool
    parallel: bool | str = False
    qkv_layout: QkvLayout
    multi_query: bool = False
    embedding: str
    head: str
    final_norm: str
    layer: str
    linears: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, str]
    biases: Mapping[str, bool | str] = field(default_factory=frozen)
    head_bias: bool = False
    transposed: bool = False
    scaled_embedding: bool = False
    embedding_norm: str | None = None
    positions: str | None = None
    position_offset: int = 0
    alibi: bool | str = False
    alibi_scaled: bool = False
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=frozen)
    defaults: Mapping[str, Any] = field(default_factory=frozen)
    inner: int | None = None
    window_every: int | None = None
    gelu_is_tanh: bool = False
