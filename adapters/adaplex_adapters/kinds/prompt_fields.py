"""The fields that all of PEFT's prompt learning configs share, and the tensor that they save."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.peft_fields import (
    CONFIG_FILE,
    FieldRules,
    base_model_problem,
    count_problem,
    field_problems,
)
from adaplex_adapters.problems import raise_if_any, shown

SAVED = "prompt_embeddings"
_SIZE = 1 << 20
_SHARED = frozenset(
    {"num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim"}
)
_REFUSED = {
    "modules_to_save": "it replaces whole modules of the shared base beside a prompt; train it without modules_to_save",
}
# A raw encoder's parameters, as a copy of a running model's state names them.
_RAW_PREFIX = re.compile(r"(?:base_model\.)?(?:prompt_encoder\.)?(?:default\.)?")


@dataclass(frozen=True)
class PromptConfig:
    """tokens: n. width: features of a token's vector. layers, heads: None unless the config says."""

    tokens: int
    width: int
    layers: int | None
    heads: int | None
    base_model: str


def parse_prompt_config(
    fields: Mapping[str, Any], limits: ReadLimits, read: frozenset[str], harmless: frozenset[str]
) -> PromptConfig:
    """The shared fields. read, harmless: the kind's own. Raises InvalidAdapter."""
    rules = FieldRules(read=_SHARED | read, harmless=harmless, refused=_REFUSED)
    raise_if_any([*field_problems(fields, rules), *_problems(fields, limits), *base_model_problem(fields)])
    return PromptConfig(
        tokens=fields["num_virtual_tokens"],
        width=fields["token_dim"],
        layers=fields.get("num_layers"),
        heads=fields.get("num_attention_heads"),
        base_model=fields.get("base_model_name_or_path") or "",
    )


def _problems(fields: Mapping[str, Any], limits: ReadLimits) -> Iterator[str]:
    yield from count_problem("num_virtual_tokens", fields.get("num_virtual_tokens"), limits.max_virtual_tokens)
    yield from count_problem("token_dim", fields.get("token_dim"), _SIZE)
    for name in ("num_layers", "num_attention_heads"):
        if fields.get(name) is not None:
            yield from count_problem(name, fields[name], _SIZE)
    if fields.get("num_transformer_submodules") not in (None, 1):
        parts = shown(fields["num_transformer_submodules"])
        yield f"{CONFIG_FILE} has num_transformer_submodules={parts}; only decoders, which have one, are served."


def saved_or_raw(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """(what PEFT saves, {}) or (None, a raw encoder's parameters by their own names). Raises InvalidAdapter."""
    if SAVED in tensors:
        raise_if_any([f"Tensor {key} would stay unused beside {SAVED}." for key in tensors if key != SAVED])
        return tensors[SAVED], {}
    raw: dict[str, torch.Tensor] = {}
    problems = [] if tensors else ["The adapter holds no tensors."]
    for key, tensor in tensors.items():
        name = _RAW_PREFIX.sub("", key, count=1)
        if name in raw:
            problems.append(f"The encoder's {name} is there twice.")
        raw[name] = tensor
    raise_if_any(problems)
    return None, raw


def take(raw: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Exactly these parameters of a raw encoder, in float32. Raises InvalidAdapter for others and other shapes."""
    problems = [f"The encoder has no {name}." for name in shapes if name not in raw]
    for name, tensor in raw.items():
        if name not in shapes:
            problems.append(f"Tensor {name} would stay unused: the adapter has {SAVED}, or {', '.join(shapes)}.")
        elif tuple(tensor.shape) != shapes[name]:
            problems.append(f"The encoder's {name} has shape {list(tensor.shape)}, not {list(shapes[name])}.")
    raise_if_any(problems)
    return {name: raw[name].float() for name in shapes}


def matrix_problem(tensor: torch.Tensor, rows: int, columns: int) -> list[str]:
    """Unless what PEFT saves is [rows, columns]."""
    if list(tensor.shape) == [rows, columns]:
        return []
    return [f"{SAVED} has shape {list(tensor.shape)}; {CONFIG_FILE} gives it [{rows}, {columns}]."]
