"""LoHa (Hyeon-Woo et al. 2022) and LoKr (Edalati et al. 2022) of linears, as PEFT saves them.

LoHa's change of a weight is (w1_a w1_b) * (w2_a w2_b), entry by entry: a LoRA of rank r * r whose rows and columns are
the products of the two factors' ones. LoKr's is the Kronecker product of w1 and w2, each whole or itself a product: a
LoRA whose factors are the Kronecker products of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from adaplex_adapters.kinds.factored import (
    REFUSED,
    Parts,
    check_fields,
    check_size,
    matrices,
    product_problem,
    reading,
    rounded,
)
from adaplex_adapters.kinds.reading import Reading, Source
from adaplex_adapters.patterns import by_pattern
from adaplex_adapters.peft_config import alpha_problem, rank_problem
from adaplex_adapters.peft_fields import CONFIG_FILE, FieldRules
from adaplex_adapters.problems import Gathered, raise_if_any, shown
from adaplex_adapters.spec import KIND_LOHA, KIND_LOKR, LoraModule
from adaplex_adapters.targeting import TARGET_FIELDS
from adaplex_adapters.tensor_keys import by_module, incomplete

_READ = TARGET_FIELDS | {"alpha", "alpha_pattern", "r", "rank_pattern"}
_HARMLESS = frozenset({"init_weights", "module_dropout", "rank_dropout"})
_LOHA_RULES = FieldRules(read=_READ, harmless=_HARMLESS, refused=REFUSED)
_LOKR_RULES = FieldRules(
    # How the shapes were found, which the tensors have themselves.
    read=_READ,
    harmless=_HARMLESS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
    refused=REFUSED,
)
_LOHA_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
Factors = tuple[torch.Tensor, torch.Tensor]


def read_loha(source: Source) -> Reading:
    """A LoHa, as the LoRA that it is equal to."""
    parts, ranks, scalings = _parts(source, _LOHA_RULES, _LOHA_PARTS)
    raise_if_any(incomplete(parts, *_LOHA_PARTS))
    raise_if_any([p for path, part in parts.items() for p in _loha_problems(path, part, ranks[path])])
    largest = max(ranks.values()) ** 2
    if largest > source.limits.max_rank:
        raise_if_any([f"Its LoHa is a LoRA of rank {largest}; ranks up to {source.limits.max_rank} are served."])
    values = [
        ranks[path] ** 2 * (part[_LOHA_PARTS[0]].shape[0] + part[_LOHA_PARTS[1]].shape[1])
        for path, part in parts.items()
    ]
    check_size(sum(values), source.limits)
    modules = {}
    for path, part in parts.items():
        w1_a, w1_b, w2_a, w2_b = (part[name].float() for name in _LOHA_PARTS)
        a = (w1_b[:, None] * w2_b[None]).flatten(0, 1)
        b = (w1_a[:, :, None] * w2_a[:, None]).flatten(1, 2)
        modules[path] = LoraModule(a, b, scalings[path])
    return reading(KIND_LOHA, source, modules)


def read_lokr(source: Source) -> Reading:
    """A LoKr, as the LoRA that it is equal to."""
    parts, _, scalings = _parts(source, _LOKR_RULES, _LOKR_PARTS)
    raise_if_any([p for path, part in parts.items() for p in _lokr_problems(path, part)])
    ranks = {path: _thin_rank(part, "lokr_w1") * _thin_rank(part, "lokr_w2") for path, part in parts.items()}
    most = source.limits.max_rank
    raise_if_any(
        [
            f"The LoKr of {path} is a LoRA of rank {rank}; ranks up to {most} are served. Train it with a smaller r or "
            "another decompose_factor."
            for path, rank in ranks.items()
            if rank > most
        ]
    )
    check_size(sum(rank * sum(_kron_shape(parts[path])) for path, rank in ranks.items()), source.limits)
    modules = {}
    for path, part in parts.items():
        (b1, a1), (b2, a2) = _thin(part, "lokr_w1"), _thin(part, "lokr_w2")
        modules[path] = LoraModule(torch.kron(a1, a2), torch.kron(b1, b2), scalings[path])
    return reading(KIND_LOKR, source, modules)


def _parts(
    source: Source, rules: FieldRules, names: tuple[str, ...]
) -> tuple[Mapping[str, Parts], dict[str, int], dict[str, float]]:
    """Tensors, ranks and scalings by module."""
    fields = source.fields
    gathered = Gathered()
    gathered.step(check_fields, source, rules, list(_number_problems(source)))
    parts = gathered.step(by_module, source.tensors, {name: rf"{name}(?:\.default)?" for name in names})
    gathered.raise_if_any()
    assert parts is not None
    ranks = by_pattern(fields.get("rank_pattern") or {}, fields.get("r", 8), "rank_pattern", source.budget, parts)
    alphas = by_pattern(
        fields.get("alpha_pattern") or {}, fields.get("alpha", 8), "alpha_pattern", source.budget, parts
    )
    raise_if_any([p for path, part in parts.items() for p in matrices(path, part)])
    return parts, ranks, {path: rounded(alphas[path] / ranks[path]) for path in parts}


def _number_problems(source: Source) -> Iterator[str]:
    fields, limits = source.fields, source.limits
    yield from rank_problem("r", fields.get("r", 8), limits)
    yield from alpha_problem("alpha", fields.get("alpha", 8))
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = fields.get(name) or {}
        if not isinstance(patterns, dict):
            yield f"{CONFIG_FILE} has {name}={shown(patterns)}; it must be an object."
            continue
        for key, value in patterns.items():
            what = f"{name}[{shown(key)}]"
            yield from rank_problem(what, value, limits) if name[0] == "r" else alpha_problem(what, value)


def _loha_problems(path: str, part: Parts, rank: int) -> Iterator[str]:
    for left, right in (_LOHA_PARTS[:2], _LOHA_PARTS[2:]):
        if part[left].shape[1] != rank or part[right].shape[0] != rank:
            found = f"{list(part[left].shape)} and {list(part[right].shape)}"
            yield f"The {left} and {right} of {path} have shapes {found}, but {CONFIG_FILE} gives them rank {rank}."
    shapes = [[part[a].shape[0], part[b].shape[1]] for a, b in (_LOHA_PARTS[:2], _LOHA_PARTS[2:])]
    if shapes[0] != shapes[1]:
        yield f"The two products of {path} have shapes {shapes[0]} and {shapes[1]}; they must be the same."


def _lokr_problems(path: str, part: Parts) -> Iterator[str]:
    for name in ("lokr_w1", "lokr_w2"):
        pair = {f"{name}_a", f"{name}_b"}
        there = {key for key in part if key.startswith(name)}
        if there not in ({name}, pair):
            yield f"Module {path} has {sorted(there)}; it must have either {name}, or {name}_a and {name}_b."
        elif there == pair:
            yield from product_problem(path, part, f"{name}_a", f"{name}_b")


def _thin_rank(part: Parts, name: str) -> int:
    return min(part[name].shape) if name in part else part[f"{name}_b"].shape[0]


def _kron_shape(part: Parts) -> tuple[int, int]:
    """[out, in] of the product."""
    rows = columns = 1
    for name in ("lokr_w1", "lokr_w2"):
        left, right = (part[name], part[name]) if name in part else (part[f"{name}_a"], part[f"{name}_b"])
        rows, columns = rows * left.shape[0], columns * right.shape[1]
    return rows, columns


def _thin(part: Parts, name: str) -> Factors:
    """(b, a) whose product is the factor, in float32; a whole one is multiplied by the smaller identity."""
    if name not in part:
        return part[f"{name}_a"].float(), part[f"{name}_b"].float()
    whole = part[name].float()
    rows, columns = whole.shape
    return (whole, torch.eye(columns)) if columns <= rows else (torch.eye(rows), whole)
