"""Prefix tuning (Li & Liang 2021): trained keys and values before the prompt, in every layer.

PEFT saves the keys and values [n, layers * 2 * width], of key and value of layer 0, then of layer 1, ...; with
prefix_projection too. A raw encoder with a projection (from a trainer's checkpoint) is run once, here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.fit import wrong_base
from adaplex_adapters.kinds.prompt_fields import (
    PromptConfig,
    matrix_problem,
    parse_prompt_config,
    saved_or_raw,
    take,
)
from adaplex_adapters.kinds.reading import Reading, Source
from adaplex_adapters.peft_fields import CONFIG_FILE, count_problem, flag_problem
from adaplex_adapters.problems import Gathered, raise_if_any
from adaplex_adapters.spec import KIND_PREFIX_TUNING, Adapter, draft

_MAX_HIDDEN = 1 << 16
_MAX_VALUES = 1 << 28
_OWN_FIELDS = frozenset({"encoder_hidden_size", "prefix_projection"})


def _fit(adapter: Adapter, base: BaseShape) -> None:
    assert adapter.prefix is not None
    layers, _, _, heads, head_dim = adapter.prefix.shape
    found, wanted = (layers, heads, head_dim), (base.num_layers, base.num_kv_heads, base.head_dim)
    if found != wanted:
        raise_if_any(
            [
                wrong_base(adapter.spec.base_model, base),
                f"Its prefix is for {found[0]} layers of {found[1]} key heads of {found[2]} features; the base has "
                f"{wanted[0]} of {wanted[1]} of {wanted[2]}.",
            ]
        )


def read_prefix_tuning(source: Source) -> Reading:
    """A prefix-tuned adapter: its keys and values, or the encoder that makes them."""
    gathered = Gathered()
    config = gathered.step(_parse, source)
    found = gathered.step(saved_or_raw, source.tensors)
    gathered.raise_if_any()
    assert config is not None and found is not None and config.layers is not None and config.heads is not None
    saved, raw = found
    if saved is None:
        saved = _encode(source.fields, config, config.layers, raw)
    raise_if_any(matrix_problem(saved, config.tokens, 2 * config.layers * config.width))
    shape = config.tokens, config.layers, 2, config.heads, config.width // config.heads
    prefix = saved.reshape(shape).permute(1, 2, 0, 3, 4).contiguous()
    return Reading(Adapter(draft(KIND_PREFIX_TUNING, config.base_model), prefix=prefix), _fit)


def _parse(source: Source) -> PromptConfig:
    fields = source.fields
    config = parse_prompt_config(fields, source.limits, _OWN_FIELDS, frozenset({"init_weights"}))
    problems = list(flag_problem(fields, "prefix_projection"))
    for name, value in (("num_layers", config.layers), ("num_attention_heads", config.heads)):
        if value is None:
            problems.append(f"{CONFIG_FILE} has no {name}, without which a prefix has no shape (PEFT writes it).")
    if config.heads is not None and config.width % config.heads:
        problems.append(f"{CONFIG_FILE} has token_dim={config.width}, which {config.heads} heads do not divide.")
    if not problems and 2 * config.tokens * config.width * (config.layers or 0) > _MAX_VALUES:
        problems.append(f"{CONFIG_FILE} describes a prefix of more than {_MAX_VALUES} values, which is not read.")
    raise_if_any(problems)
    return config


def _encode(
    fields: Mapping[str, Any], config: PromptConfig, layers: int, raw: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """What PEFT's PrefixEncoder gives, in float32."""
    tokens, width, out = config.tokens, config.width, 2 * layers * config.width
    if not fields.get("prefix_projection", False):
        return take(raw, {"embedding.weight": (tokens, out)})["embedding.weight"]
    raise_if_any(list(count_problem("encoder_hidden_size", fields.get("encoder_hidden_size"), _MAX_HIDDEN)))
    hidden = fields["encoder_hidden_size"]
    weights = take(
        raw,
        {
            "embedding.weight": (tokens, width),
            "transform.0.weight": (hidden, width),
            "transform.0.bias": (hidden,),
            "transform.2.weight": (out, hidden),
            "transform.2.bias": (out,),
        },
    )
    states = F.linear(weights["embedding.weight"], weights["transform.0.weight"], weights["transform.0.bias"]).tanh()
    return F.linear(states, weights["transform.2.weight"], weights["transform.2.bias"])
