"""LoRA (Hu et al. 2021) with rsLoRA and DoRA, as PEFT saves it, and the weights that it may hold beside."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from adaplex_adapters.fit import ModuleFit
from adaplex_adapters.kinds.reading import Reading, Source
from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.patterns import by_pattern
from adaplex_adapters.peft_config import LoraConfigFile, parse_config
from adaplex_adapters.peft_fields import CONFIG_FILE
from adaplex_adapters.problems import Gathered, raise_if_any, shown
from adaplex_adapters.spec import KIND_DORA, Adapter, LoraModule, draft
from adaplex_adapters.tensor_keys import by_module, incomplete, unknown

MAX_SCALING = 1e9
Parts = Mapping[str, torch.Tensor]
_ENDINGS = {
    "lora_A": r"lora_A(?:\.default)?\.weight",
    "lora_B": r"lora_B(?:\.default)?\.weight",
    "lora_embedding_A": r"lora_embedding_A(?:\.default)?",
    "lora_embedding_B": r"lora_embedding_B(?:\.default)?",
    "lora_magnitude_vector": r"lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    "base_layer": r"base_layer\.weight",
    "weight": r"(?:modules_to_save\.default\.)?weight",
}
# Names by which PEFT and transformers know the embedding and the head, whose weights PEFT may save beside an adapter.
_VOCABULARY = ("embed_tokens", "lm_head", "embed_in", "embed_out", "wte", "word_embeddings")


def read_lora(source: Source) -> Reading:
    """LoRA, rsLoRA or DoRA on linears, embedding and head."""
    gathered = Gathered()
    config = gathered.step(parse_config, source.fields, source.limits)
    parts = gathered.step(by_module, source.tensors, _ENDINGS)
    gathered.raise_if_any()
    assert config is not None and parts is not None
    weights = {path: part for path, part in parts.items() if not _pair(part)}
    pairs = {path: part for path, part in parts.items() if _pair(part)}
    problems = [p for path, part in pairs.items() for p in _pair_problems(path, part, config)]
    replaced, copies = saved_weights(config.targeting.saved, weights, problems)
    copies |= {path: part["base_layer"] for path, part in pairs.items() if "base_layer" in part}
    problems += [p for path, tensor in copies.items() for p in _copy_problems(path, tensor)]
    if not pairs and not problems:
        problems.append("The adapter holds no LoRA tensors.")
    raise_if_any(problems)
    adapter = Adapter(
        draft(config.kind, config.base_model),
        modules=_modules(config, pairs, source),
        replaced=replaced,
        base_copies=copies,
    )
    return Reading(adapter, ModuleFit(config.targeting, source.budget, embeddings=True))


def saved_weights(
    saved: tuple[str, ...], weights: Mapping[str, Parts], problems: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(replaced, copies) of `Adapter`, of modules that have a whole weight. Anything amiss is added to `problems`."""
    replaced: dict[str, torch.Tensor] = {}
    copies: dict[str, torch.Tensor] = {}
    for path, part in weights.items():
        named = any(f".{path}".endswith(f".{name}") for name in saved)
        if named and part.keys() == {"weight"}:
            replaced[path] = part["weight"]
        elif len(part) == 1 and not named and path.rpartition(".")[2] in _VOCABULARY:
            copies[path] = next(iter(part.values()))
        else:
            problems.extend(unknown(f"base_model.model.{path}.{key}", tuple(_ENDINGS)) for key in part)
    for name in saved:
        if not any(f".{path}".endswith(f".{name}") for path in replaced):
            problems.append(f"{CONFIG_FILE} names {shown(name)} in modules_to_save, but its weight is missing.")
    for path, tensor in replaced.items():
        if tensor.dim() != 2 or 0 in tensor.shape:
            problems.append(f"The weight of {path} has shape {list(tensor.shape)}; it must be a matrix.")
    return replaced, copies


def _pair(part: Parts) -> bool:
    return any(name.startswith("lora_") for name in part)


def _pair_problems(path: str, part: Parts, config: LoraConfigFile) -> Iterator[str]:
    embedding = "lora_embedding_A" in part or "lora_embedding_B" in part
    halves = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    yield from incomplete({path: part}, *halves)
    dora = config.kind == KIND_DORA
    if embedding and ("lora_A" in part or "lora_B" in part):
        yield f"Module {path} has the tensors of a linear and of an embedding."
    if embedding and dora:
        yield f"Module {path} is an embedding with DoRA, which is not served; take it out of target_modules."
    elif dora:
        yield from incomplete({path: part}, "lora_magnitude_vector")
    elif "lora_magnitude_vector" in part:
        yield f"Module {path} has a lora_magnitude_vector, but {CONFIG_FILE} does not say use_dora, so it is no DoRA."
    if "weight" in part:
        yield f"Module {path} is adapted and replaced at once."
    if config.tied and path.rpartition(".")[2] in _VOCABULARY:
        yield (
            f"{CONFIG_FILE} says ensure_weight_tying and adapts {path}: one adapter of embedding and head together is "
            "not served; train it with ensure_weight_tying=False."
        )


def _copy_problems(path: str, tensor: torch.Tensor) -> Iterator[str]:
    if tensor.dim() != 2 or 0 in tensor.shape or path.rpartition(".")[2] not in _VOCABULARY:
        yield f"The adapter holds a base weight of {path}, {list(tensor.shape)}; only the vocabulary's is read."


def _modules(config: LoraConfigFile, pairs: Mapping[str, Parts], source: Source) -> dict[str, LoraModule]:
    ranks = by_pattern(config.rank_pattern, config.rank, "rank_pattern", source.budget, pairs)
    alphas = by_pattern(config.alpha_pattern, config.alpha, "alpha_pattern", source.budget, pairs)
    raise_if_any([p for path, part in pairs.items() for p in _shape_problems(path, part, ranks[path], source.limits)])
    divisors = {path: math.sqrt(rank) if config.use_rslora else rank for path, rank in ranks.items()}
    modules = {path: _module(part, alphas[path] / divisors[path]) for path, part in pairs.items()}
    raise_if_any(scaling_problems(modules))
    return modules


def _module(part: Parts, scaling: float) -> LoraModule:
    # The scaling is rounded to the float32 in which it is applied, so that every way of writing it means the same.
    scaling = float(np.float32(scaling))
    if "lora_embedding_A" in part:
        return LoraModule(part["lora_embedding_A"], part["lora_embedding_B"], scaling, embedding=True)
    return LoraModule(part["lora_A"], part["lora_B"], scaling, part.get("lora_magnitude_vector"))


def scaling_problems(modules: Mapping[str, LoraModule]) -> list[str]:
    """A problem for each module whose scaling nobody can have meant."""
    return [
        f"Module {path} is scaled by {module.scaling:g}, which is beyond {MAX_SCALING:g}; look at lora_alpha."
        for path, module in modules.items()
        if not abs(module.scaling) <= MAX_SCALING
    ]


def _shape_problems(path: str, part: Parts, rank: int, limits: ReadLimits) -> Iterator[str]:
    """What is wrong with the shapes as such; whether they fit the base comes later."""
    for name, tensor in part.items():
        axis = {"A": 0, "B": 1}.get(name[-1])
        if name == "lora_magnitude_vector" and tensor.dim() != 1:
            yield f"The {name} of {path} has shape {list(tensor.shape)}; it must be a vector."
        elif axis is not None:
            yield from rank_problems(f"{name} of {path}", tensor, axis, rank, limits)


def rank_problems(what: str, tensor: torch.Tensor, axis: int, rank: int, limits: ReadLimits) -> Iterator[str]:
    """Unless the tensor is a matrix of this rank along the axis."""
    if tensor.dim() != 2:
        yield f"The {what} has shape {list(tensor.shape)}; it must be a matrix."
    elif tensor.shape[axis] == 0:
        yield f"The {what} has shape {list(tensor.shape)}: rank 0 adapts nothing."
    elif tensor.shape[axis] > limits.max_rank:
        yield f"The {what} has rank {tensor.shape[axis]}; ranks up to {limits.max_rank} are served."
    elif tensor.shape[axis] != rank:
        yield (
            f"The {what} has shape {list(tensor.shape)}, so rank {tensor.shape[axis]}, but {CONFIG_FILE} gives it rank "
            f"{rank}."
        )
