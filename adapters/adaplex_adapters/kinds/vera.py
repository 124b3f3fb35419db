"""VeRA (Kopiczko et al. 2024) as PEFT saves it: random matrices A and B that all modules share, from which each takes
the corner that it needs, with trained factors on the rank rows and on the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.fit import adaptable
from adaplex_adapters.kinds.factored import REFUSED, Parts, check_fields, check_size, reading
from adaplex_adapters.kinds.reading import Reading, Source
from adaplex_adapters.peft_config import rank_problem
from adaplex_adapters.peft_fields import CONFIG_FILE, FieldRules
from adaplex_adapters.problems import Gathered, raise_if_any, shown
from adaplex_adapters.spec import KIND_VERA, Adapter, LoraModule
from adaplex_adapters.targeting import TARGET_FIELDS
from adaplex_adapters.tensor_keys import by_module, incomplete

_A, _B = "base_model.vera_A", "base_model.vera_B"
_PARTS = ("vera_lambda_b", "vera_lambda_d")
_RULES = FieldRules(
    read=TARGET_FIELDS | {"bias", "r", "save_projection"},
    harmless=frozenset({"d_initial", "fan_in_fan_out", "init_weights", "projection_prng_key", "vera_dropout"}),
    refused=REFUSED,
)


def read_vera(source: Source) -> Reading:
    """A VeRA, as the LoRA that it is equal to. A and B must have been saved: PEFT's default."""
    rank = source.fields.get("r", 256)
    shared = {name: tensor for name, tensor in source.tensors.items() if name in (_A, _B)}
    own = {name: tensor for name, tensor in source.tensors.items() if name not in shared}
    gathered = Gathered()
    gathered.step(check_fields, source, _RULES, list(rank_problem("r", rank, source.limits)))
    parts = gathered.step(by_module, own, {part: rf"{part}(?:\.default)?" for part in _PARTS})
    gathered.add(_shared_problems(shared, rank))
    gathered.raise_if_any()
    assert parts is not None
    raise_if_any(incomplete(parts, *_PARTS))
    raise_if_any([p for path, part in parts.items() for p in _shape_problems(path, part, shared, rank)])
    check_size(
        sum(shared[_A].numel() + part["vera_lambda_b"].shape[0] * rank for part in parts.values()), source.limits
    )
    modules = {path: _module(part, shared) for path, part in parts.items()}
    return reading(KIND_VERA, source, modules, cut=_cut)


def _cut(adapter: Adapter, base: BaseShape) -> Adapter:
    """Each module's part of the columns that it shares with wider ones."""
    shapes = adaptable(base)
    modules = {
        path: replace(module, a=module.a[:, : shapes[path].in_features].contiguous()) if path in shapes else module
        for path, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def _module(part: Parts, shared: Mapping[str, torch.Tensor]) -> LoraModule:
    outputs = part["vera_lambda_b"].shape[0]
    a = part["vera_lambda_d"][:, None] * shared[_A]
    b = part["vera_lambda_b"][:, None] * shared[_B][:outputs]
    return LoraModule(a, b, 1.0)


def _shared_problems(shared: Mapping[str, torch.Tensor], rank: int) -> Iterator[str]:
    for name, axis in ((_A, 0), (_B, 1)):
        if name not in shared:
            yield (
                f"The random matrix {name} is missing: it was saved with save_projection=False, and what a seed draws "
                "differs between versions. Save it with save_projection=True."
            )
        elif shared[name].dim() != 2 or shared[name].shape[axis] != rank or 0 in shared[name].shape:
            yield f"{name} has shape {list(shared[name].shape)}, but {CONFIG_FILE} gives it rank {shown(rank)}."


def _shape_problems(path: str, part: Parts, shared: Mapping[str, torch.Tensor], rank: int) -> Iterator[str]:
    b, d = part["vera_lambda_b"], part["vera_lambda_d"]
    if list(d.shape) != [rank]:
        yield f"The vera_lambda_d of {path} has shape {list(d.shape)}; it must be [{rank}]."
    if b.dim() != 1 or not 0 < b.shape[0] <= shared[_B].shape[0]:
        yield f"The vera_lambda_b of {path} has shape {list(b.shape)}; {_B} has {shared[_B].shape[0]} rows for it."
