"""Prompt tuning (Lester et al. 2021) and P-tuning (Liu et al. 2021): trained vectors before the prompt's embeddings.

PEFT saves the vectors themselves for both. A raw prompt encoder of P-tuning (from a trainer's checkpoint) is run once,
here, so that nothing of it is left when it is served.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from adaplex_adapters.peft_fields import CONFIG_FILE, count_problem
from adaplex_adapters.problems import Gathered, raise_if_any, shown
from adaplex_adapters.spec import KIND_P_TUNING, KIND_PROMPT_TUNING, Adapter, draft

_MAX_HIDDEN = 1 << 16
_MAX_LAYERS = 8
_TUNING_HARMLESS = frozenset(
    {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"}
)
_ENCODER_FIELDS = frozenset({"encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"})


def _fit(adapter: Adapter, base: BaseShape) -> None:
    assert adapter.soft_prompt is not None
    width = adapter.soft_prompt.shape[1]
    if width != base.hidden_size:
        wrong = wrong_base(adapter.spec.base_model, base)
        raise_if_any([wrong, f"Its virtual tokens have {width} features; the base has {base.hidden_size}."])


def read_prompt_tuning(source: Source) -> Reading:
    """A prompt-tuned adapter; how the prompt was initialized does not matter any more."""
    gathered = Gathered()
    config = gathered.step(parse_prompt_config, source.fields, source.limits, frozenset(), _TUNING_HARMLESS)
    found = gathered.step(saved_or_raw, source.tensors)
    gathered.raise_if_any()
    assert config is not None and found is not None
    saved, raw = found
    if saved is None:
        saved = take(raw, {"embedding.weight": (config.tokens, config.width)})["embedding.weight"]
    return _reading(KIND_PROMPT_TUNING, config, saved)


def read_p_tuning(source: Source) -> Reading:
    """A P-tuned adapter: its prompt, or the encoder that makes it."""
    gathered = Gathered()
    config = gathered.step(
        parse_prompt_config, source.fields, source.limits, _ENCODER_FIELDS, frozenset({"encoder_dropout"})
    )
    found = gathered.step(saved_or_raw, source.tensors)
    gathered.raise_if_any()
    assert config is not None and found is not None
    saved, raw = found
    return _reading(KIND_P_TUNING, config, saved if saved is not None else _encode(source.fields, config, raw))


def _reading(kind: str, config: PromptConfig, prompt: torch.Tensor) -> Reading:
    raise_if_any(matrix_problem(prompt, config.tokens, config.width))
    return Reading(Adapter(draft(kind, config.base_model), soft_prompt=prompt), _fit)


def _encode(fields: Mapping[str, Any], config: PromptConfig, raw: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What PEFT's PromptEncoder gives, in float32."""
    raise_if_any(list(_encoder_problems(fields)))
    hidden, width = fields["encoder_hidden_size"], config.width
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.tokens, width)}
    if str(fields.get("encoder_reparameterization_type", "MLP")) == "LSTM":
        layers = fields.get("encoder_num_layers", 2)
        lstm = torch.nn.LSTM(width, hidden, layers, bidirectional=True, batch_first=True, device="meta")
        lstm_shapes = {f"lstm_head.{name}": tuple(weight.shape) for name, weight in lstm.named_parameters()}
        heads = _linear_shapes(0, 2 * hidden, 2 * hidden) | _linear_shapes(2, 2 * hidden, width)
        weights = take(raw, shapes | lstm_shapes | heads)
        weights_of_lstm = {name: weights[f"lstm_head.{name}"] for name, _ in lstm.named_parameters()}
        with torch.no_grad():
            inputs = weights["embedding.weight"][None]
            states = torch.func.functional_call(lstm.to_empty(device="cpu"), weights_of_lstm, (inputs,))[0][0]
    else:
        heads = _linear_shapes(0, width, hidden) | _linear_shapes(2, hidden, hidden) | _linear_shapes(4, hidden, width)
        weights = take(raw, shapes | heads)
        states = weights["embedding.weight"]
    last = max(int(name.split(".")[1]) for name in heads)
    for at in range(0, last + 2, 2):
        states = F.linear(states, weights[f"mlp_head.{at}.weight"], weights[f"mlp_head.{at}.bias"])
        states = states if at == last else F.relu(states)
    return states


def _linear_shapes(at: int, into: int, out: int) -> dict[str, tuple[int, ...]]:
    return {f"mlp_head.{at}.weight": (out, into), f"mlp_head.{at}.bias": (out,)}


def _encoder_problems(fields: Mapping[str, Any]) -> Iterator[str]:
    yield from count_problem("encoder_hidden_size", fields.get("encoder_hidden_size"), _MAX_HIDDEN)
    if fields.get("encoder_reparameterization_type", "MLP") not in ("MLP", "LSTM"):
        kind = shown(fields["encoder_reparameterization_type"])
        yield f"{CONFIG_FILE} has encoder_reparameterization_type={kind}; it must be MLP or LSTM."
    yield from count_problem("encoder_num_layers", fields.get("encoder_num_layers", 2), _MAX_LAYERS)
