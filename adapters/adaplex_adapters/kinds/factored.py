"""What PEFT's kinds have in common whose change of a weight is a product of two thin matrices: they are read as the
LoRA that they are equal to. One that needs a higher rank than is served is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.fit import ModuleFit, dimension_problems
from adaplex_adapters.kinds.lora import scaling_problems
from adaplex_adapters.kinds.reading import Reading, Source
from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.peft_fields import FieldRules, base_model_problem, field_problems
from adaplex_adapters.problems import raise_if_any
from adaplex_adapters.spec import Adapter, LoraModule, draft
from adaplex_adapters.targeting import target_problems, targeting

Parts = Mapping[str, torch.Tensor]
REFUSED = {
    "modules_to_save": "it replaces whole modules of the shared base; train it without modules_to_save",
    "use_effective_conv2d": "it adapts convolutions, which the served families do not have",
}


def check_fields(source: Source, rules: FieldRules, more: Iterable[str] = ()) -> None:
    """The fields that every such kind has. more: problems of the kind's own fields."""
    fields = source.fields
    raise_if_any(
        [*field_problems(fields, rules), *more, *target_problems(fields), *base_model_problem(fields)],
    )


def reading(
    kind: str,
    source: Source,
    modules: Mapping[str, LoraModule],
    idle: frozenset[str] = frozenset(),
    cut: Callable[[Adapter, BaseShape], Adapter] | None = None,
) -> Reading:
    """The adapter of these modules. idle: modules that the config targets and that do nothing. cut: see `Reading`."""
    if not modules:
        raise_if_any(["The adapter holds no module that does anything."])
    raise_if_any([*scaling_problems(modules), *_rank_problems(modules, source.limits, kind)])
    adapter = Adapter(draft(kind, source.fields.get("base_model_name_or_path") or ""), modules=modules)
    return Reading(adapter, ModuleFit(targeting(source.fields), source.budget, idle=idle), cut)


def _rank_problems(modules: Mapping[str, LoraModule], limits: ReadLimits, kind: str) -> Iterator[str]:
    for path, module in modules.items():
        if module.a.shape[0] > limits.max_rank:
            yield (
                f"The {kind} of {path} is a LoRA of rank {module.a.shape[0]}; ranks up to {limits.max_rank} are "
                "served. Train it with a smaller r."
            )


def matrices(path: str, part: Parts) -> Iterator[str]:
    """Unless each part is a matrix that is not empty."""
    for name, tensor in part.items():
        yield from dimension_problems(f"{name} of {path}", tensor, 2)


def product_problem(path: str, part: Parts, left: str, right: str) -> Iterator[str]:
    """Unless the parts can be multiplied, left times right."""
    if part[left].shape[1] != part[right].shape[0]:
        shapes = list(part[left].shape), list(part[right].shape)
        yield f"The {left} of {path} has shape {shapes[0]} and its {right} {shapes[1]}, so they have no product."


def rounded(scaling: float) -> float:
    """The float32 in which a scaling is applied."""
    return float(np.float32(scaling))


def check_size(values: int, limits: ReadLimits) -> None:
    """Raise InvalidAdapter when the matrices that small files describe would take more memory than a file may."""
    if 4 * values > limits.max_file_bytes:
        raise_if_any([f"As a LoRA the adapter takes {4 * values} bytes; at most {limits.max_file_bytes} are read."])
