"""Does an adapter fit a base: known modules, right shapes, and no difference between what the config targets and what
has tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from adaplex_adapters.automaton import WorkBudget
from adaplex_adapters.base_shape import BaseShape, LinearShape
from adaplex_adapters.patterns import TargetRule
from adaplex_adapters.peft_fields import CONFIG_FILE
from adaplex_adapters.problems import raise_if_any, shown
from adaplex_adapters.spec import Adapter, LoraModule
from adaplex_adapters.targeting import Targeting


@dataclass(frozen=True)
class ModuleFit:
    """The check of an adapter's modules and factors.

    embeddings: whether this kind can adapt the embedding. idle: modules that the config targets and that have tensors
    which do nothing.
    """

    targeting: Targeting
    budget: WorkBudget
    embeddings: bool = False
    idle: frozenset[str] = frozenset()

    def __call__(self, adapter: Adapter, base: BaseShape) -> None:
        """Raise InvalidAdapter unless the adapter fits. Says "wrong base" when most of it does not."""
        shapes = adaptable(base, self.embeddings)
        paths = (*adapter.modules, *adapter.scales)
        problems = [p for path in paths for p in _path_problems(adapter, path, shapes)]
        problems += [
            p for path, weight in adapter.replaced.items() for p in _weight_problems(path, weight, base, "replaces")
        ]
        problems += [
            p for path, weight in adapter.base_copies.items() for p in _weight_problems(path, weight, base, "copies")
        ]
        if len(problems) * 2 > len(paths):
            problems.insert(0, wrong_base(adapter.spec.base_model, base))
        raise_if_any(problems)
        raise_if_any(list(self._target_problems(paths, shapes, base)))

    def _target_problems(
        self, paths: Collection[str], shapes: Mapping[str, LinearShape], base: BaseShape
    ) -> Iterator[str]:
        rule = TargetRule(self.targeting, self.budget)
        beside = () if not self.targeting.all_linear else (base.head, base.embedding)
        targeted = rule.targets(path for path in shapes if path not in beside)
        for path in targeted:
            if path not in paths and path not in self.idle:
                yield f"Module {path} is targeted by {CONFIG_FILE} but has no tensors; the adapter is incomplete."
        for path in sorted(set(paths) - set(targeted)):
            yield f"Module {path} has tensors but is not targeted by {CONFIG_FILE}; PEFT would leave them unused."
        for name in rule.names_without(targeted):
            yield (
                f"target_modules in {CONFIG_FILE} names {shown(name)}, which no adapted module of {base.name} "
                "has; take it out if it is not needed."
            )


def _path_problems(adapter: Adapter, path: str, shapes: Mapping[str, LinearShape]) -> Iterator[str]:
    shape = shapes.get(path)
    if shape is None:
        yield f"Module {path} is not an adaptable module of the base."
    elif path in adapter.modules:
        yield from _module_problems(path, adapter.modules[path], shape)
    else:
        scale = adapter.scales[path]
        wanted = shape.in_features if scale.on == "input" else shape.out_features
        if scale.vector.shape[0] != wanted:
            found = scale.vector.shape[0]
            yield f"Module {path} has {found} factors on its {scale.on}; the base has {wanted} features there."


def _weight_problems(path: str, weight: torch.Tensor, base: BaseShape, does: str) -> Iterator[str]:
    shape, wanted = list(weight.shape), [base.vocab_size, base.hidden_size]
    if path not in (base.embedding, base.head):
        yield f"The adapter {does} {path}; only {base.head} and {base.embedding} can stand for the base's."
    elif shape != wanted:
        yield f"The adapter {does} {path} with a weight of {shape}; the base's is {wanted}."


def adaptable(base: BaseShape, embeddings: bool = True) -> dict[str, LinearShape]:
    """Every module that can be adapted, in forward order: perhaps the embedding, the linears, the head."""
    found = dict(base.linears)
    if embeddings:
        found = {base.embedding: LinearShape(base.hidden_size, base.vocab_size), **found}
    found[base.head] = LinearShape(base.vocab_size, base.hidden_size)
    return found


def _module_problems(path: str, module: LoraModule, shape: LinearShape) -> Iterator[str]:
    rank = module.a.shape[0]
    expected = [rank, shape.in_features], [shape.out_features, rank]
    found = list(module.a.shape), list(module.b.shape)
    if found != expected:
        yield f"Module {path} has A {found[0]}, B {found[1]}; the base: {expected[0]}, {expected[1]}."
    magnitude = module.magnitude
    if magnitude is not None and list(magnitude.shape) != [shape.out_features]:
        yield f"Module {path} has a magnitude of {list(magnitude.shape)}; the base: [{shape.out_features}]."


def wrong_base(base_model: str, base: BaseShape) -> str:
    """That an adapter was made for something else."""
    made_for = f" It was made for {shown(base_model)}." if base_model else ""
    return f"Wrong base: the adapter does not fit {base.name} ({base.family}, {base.num_layers} layers).{made_for}"


def dimension_problems(what: str, tensor: torch.Tensor, dimensions: int) -> Iterator[str]:
    """Unless the tensor has so many dimensions, none of them empty."""
    if tensor.dim() != dimensions or 0 in tensor.shape:
        kind = {1: "a vector", 2: "a matrix"}[dimensions]
        yield f"The {what} has shape {list(tensor.shape)}; it must be {kind} that is not empty."
