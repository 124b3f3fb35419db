"""The names of tensors in a PEFT LoRA file, and what a tensor that is not A or B of a LoRA would be.

A key reads base_model.model.<module path>.lora_A.weight (or lora_B); PEFT leaves the adapter's name out when it saves,
but copies of a running model's state carry its default name: ...lora_A.default.weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from adaplex_adapters.problems import raise_if_any

PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
_OTHERS: tuple[tuple[str, str], ...] = (
    (r"lora_embedding_[AB]", "adapts the embedding, which is not served; take the embedding out of target_modules"),
    (r"lora_magnitude_vector", "belongs to DoRA, a kind that this version does not serve yet"),
    (r"lora_B(\.default)?\.bias", "is a trained bias of B (lora_bias), which is not served"),
    (r"ia3_l", "belongs to IA3, a kind that this version does not serve yet"),
    (r"prompt_embeddings", "is a soft prompt, a kind that this version does not serve yet"),
    (r"modules_to_save|original_module", "replaces a module of the base (modules_to_save), which is not served"),
    (r"trainable_tokens|token_adapter", "replaces rows of the embedding, which is not served"),
    (r"(^|\.)(lm_head|embed_tokens|embed_in|embed_out)\.weight$", "replaces a module of the base, which is not served"),
    (r"\.bias$", "is a trained bias, which is not served"),
)


@dataclass(frozen=True)
class Pair:
    """The two tensors of one adapted module: a [r, in], b [out, r]."""

    a: torch.Tensor
    b: torch.Tensor


def pair_up(tensors: Mapping[str, torch.Tensor]) -> dict[str, Pair]:
    """Module path -> its pair, sorted by path. InvalidAdapter for any tensor that is not half of exactly one pair."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(_unknown(key))
        elif match["half"] in (found := halves.setdefault(match["path"], {})):
            problems.append(
                f"The lora_{match['half']} of {match['path']} is there twice, with and without the name 'default'."
            )
        else:
            found[match["half"]] = tensor
    if not tensors:
        problems.append("The adapter holds no tensors.")
    problems.extend(_incomplete(halves))
    raise_if_any(problems)
    return {path: Pair(halves[path]["A"], halves[path]["B"]) for path in sorted(halves)}


def keys_of(paths: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(path, key of A, key of B) as PEFT writes them."""
    for path in paths:
        yield path, f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def _unknown(key: str) -> str:
    reason = next((text for pattern, text in _OTHERS if re.search(pattern, key)), None)
    if reason is None and re.search(r"\.lora_[AB](\.[^.]+)?\.weight$", key):
        reason = f"would stay unused: its name must be {PREFIX}<module>.lora_A.weight or .lora_B.weight"
    return f"Tensor {key} {reason or 'would stay unused: it is neither lora_A nor lora_B of a module'}."


def _incomplete(halves: Mapping[str, Mapping[str, torch.Tensor]]) -> Iterator[str]:
    for path, found in halves.items():
        for half in "AB":
            if half not in found:
                yield f"Module {path} has no lora_{half}: tensor {PREFIX}{path}.lora_{half}.weight is missing."
