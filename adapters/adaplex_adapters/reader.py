"""Reading a PEFT LoRA folder: from files that nobody trusts to an adapter that fits the base, or a refusal.

Stages, each of which reports all that it finds: the folder's files, the config, the tensor file's header, names and
shapes of the tensors, their values, and last the fit to the base. Everything but the last is independent of the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from adaplex_adapters.automaton import WorkBudget
from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.fit import check_fit
from adaplex_adapters.folder import open_folder
from adaplex_adapters.identity import revision_of
from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.patterns import by_pattern
from adaplex_adapters.peft_config import CONFIG_FILE, LoraConfigFile, parse_config
from adaplex_adapters.problems import raise_if_any
from adaplex_adapters.spec import KIND_LORA, AdapterSpec, LoraAdapter, LoraModule
from adaplex_adapters.tensor_keys import Pair, pair_up

_MAX_SCALING = 1e9

__all__ = ["ReadLimits", "read_adapter", "read_unfitted"]


def read_adapter(folder: Path, base: BaseShape, limits: ReadLimits = ReadLimits()) -> LoraAdapter:  # noqa: B008 (frozen)
    """The adapter in `folder`, its modules in the order of the base's linears.

    Raises InvalidAdapter (with every problem of the failing stage) when it is refused, NotFound when there is no such
    folder, StorageFailed when the disk fails. Takes the adapter's own size in memory, once.
    """
    adapter, config, budget = _read(folder, limits)
    check_fit(adapter, config, base, budget)
    ordered = {path: adapter.modules[path] for path in base.linears if path in adapter.modules}
    return LoraAdapter(adapter.spec, ordered)


def read_unfitted(folder: Path, limits: ReadLimits = ReadLimits()) -> LoraAdapter:  # noqa: B008 (frozen)
    """The adapter in `folder`, checked in every way but against a base; modules sorted by path."""
    return _read(folder, limits)[0]


def _read(folder: Path, limits: ReadLimits) -> tuple[LoraAdapter, LoraConfigFile, WorkBudget]:
    with open_folder(folder, limits) as opened:
        opened.check()
        config = parse_config(opened.read_config(), limits)
        pairs = pair_up(opened.read_tensors())
    budget = WorkBudget()
    modules = _modules(config, pairs, limits, budget)
    return LoraAdapter(_spec(config, modules), modules), config, budget


def _modules(
    config: LoraConfigFile, pairs: Mapping[str, Pair], limits: ReadLimits, budget: WorkBudget
) -> dict[str, LoraModule]:
    ranks = by_pattern(config.rank_pattern, config.rank, "rank_pattern", budget, pairs)
    alphas = by_pattern(config.alpha_pattern, config.alpha, "alpha_pattern", budget, pairs)
    raise_if_any([p for path, pair in pairs.items() for p in _shape_problems(path, pair, ranks[path], limits)])
    divisors = {path: math.sqrt(rank) if config.use_rslora else rank for path, rank in ranks.items()}
    modules = {
        # Rounded to the float32 in which it is applied, so that every way of writing it means the same.
        path: LoraModule(pair.a, pair.b, float(np.float32(alphas[path] / divisors[path])))
        for path, pair in pairs.items()
    }
    raise_if_any(
        [
            f"Module {path} is scaled by {module.scaling:g}, which is beyond {_MAX_SCALING:g}; look at lora_alpha."
            for path, module in modules.items()
            if abs(module.scaling) > _MAX_SCALING
        ]
    )
    return modules


def _shape_problems(path: str, pair: Pair, rank: int, limits: ReadLimits) -> Iterator[str]:
    """What is wrong with the shapes as such; whether they fit the base comes later."""
    for name, tensor, axis in (("lora_A", pair.a, 0), ("lora_B", pair.b, 1)):
        if tensor.dim() != 2:
            yield f"The {name} of {path} has shape {list(tensor.shape)}; it must be a matrix."
        elif tensor.shape[axis] == 0:
            yield f"The {name} of {path} has shape {list(tensor.shape)}: rank 0 adapts nothing."
        elif tensor.shape[axis] > limits.max_rank:
            yield f"The {name} of {path} has rank {tensor.shape[axis]}; ranks up to {limits.max_rank} are served."
        elif tensor.shape[axis] != rank:
            yield (
                f"The {name} of {path} has shape {list(tensor.shape)}, so rank {tensor.shape[axis]}, but {CONFIG_FILE} "
                f"gives it rank {rank}."
            )


def _spec(config: LoraConfigFile, modules: Mapping[str, LoraModule]) -> AdapterSpec:
    tensors = [tensor for module in modules.values() for tensor in (module.a, module.b)]
    return AdapterSpec(
        revision=revision_of(KIND_LORA, modules),
        kind=KIND_LORA,
        rank=max(module.a.shape[0] for module in modules.values()),
        targets=tuple(sorted({path.rsplit(".", 1)[-1] for path in modules})),
        parameters=sum(tensor.numel() for tensor in tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        base_model=config.base_model,
    )
