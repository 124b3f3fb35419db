"""The names of tensors in a PEFT file: which part of which module each is.

A key reads base_model.model.<module path>.<part>; PEFT leaves the adapter's name out when it saves, but copies of a
running model's state carry its default name: ...lora_A.default.weight, ...ia3_l.default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from adaplex_adapters.problems import raise_if_any

PREFIX = "base_model.model."
_OTHERS: tuple[tuple[str, str], ...] = (
    (r"lora_B(\.default)?\.bias", "is a trained bias of B (lora_bias), which is not served"),
    (r"lora_", "does not belong to this kind of adapter; it is a part of a LoRA"),
    (r"ia3_l", "does not belong to this kind of adapter; it is a part of an IA3"),
    (r"prompt_embeddings", "does not belong to this kind of adapter; it is a soft prompt"),
    (r"modules_to_save|original_module", "replaces a module of the base that modules_to_save does not name"),
    (r"trainable_tokens|token_adapter", "replaces rows of the embedding, which is not served"),
    (r"\.bias$", "is a trained bias, which is not served; train with bias='none'"),
    (r"base_layer", "belongs to the base"),
)


def by_module(tensors: Mapping[str, torch.Tensor], endings: Mapping[str, str]) -> dict[str, dict[str, torch.Tensor]]:
    """Module path -> part -> tensor, sorted by path. endings: part -> expression for what follows the path in its key.

    Raises InvalidAdapter for every tensor that is no such part, or a part twice.
    """
    patterns = {part: re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.(?:{end})") for part, end in endings.items()}
    found: dict[str, dict[str, torch.Tensor]] = {}
    problems = [] if tensors else ["The adapter holds no tensors."]
    for key, tensor in tensors.items():
        matches = ((part, pattern.fullmatch(key)) for part, pattern in patterns.items())
        part, path = next(((part, match["path"]) for part, match in matches if match), ("", ""))
        if not part or _is_part_of_another(path):
            problems.append(unknown(key, tuple(endings)))
        elif part in (parts := found.setdefault(path, {})):
            problems.append(f"The {part} of {path} is there twice, with and without the name 'default'.")
        else:
            parts[part] = tensor
    raise_if_any(problems)
    return {path: found[path] for path in sorted(found)}


def _is_part_of_another(path: str) -> bool:
    return bool(re.search(r"(^|\.)(lora_|ia3_l|hada_|lokr_|vera_|base_layer|modules_to_save|original_module)", path))


def unknown(key: str, parts: tuple[str, ...]) -> str:
    """What to say of a tensor that is none of these parts."""
    own = "|".join(part for part in parts if part not in ("base_layer", "weight"))
    misnamed = re.search(rf"\.({own})(\.(?!bias$)[^.]+)?(\.weight)?$", key)
    reason = None if misnamed else next((text for pattern, text in _OTHERS if re.search(pattern, key)), None)
    if reason is not None:
        return f"Tensor {key} {reason}."
    return f"Tensor {key} would stay unused: this kind of adapter has {', '.join(parts)} of {PREFIX}<module>."


def incomplete(parts: Mapping[str, Mapping[str, torch.Tensor]], *wanted: str) -> list[str]:
    """A problem for each module that lacks one of these parts."""
    return [
        f"Module {path} has no {part}: tensor {PREFIX}{path}.{part} is missing."
        for path, found in parts.items()
        for part in wanted
        if part not in found
    ]
