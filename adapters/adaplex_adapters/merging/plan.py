"""What becomes of every tensor of the base in a merge, decided and checked before any is read. Owns nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.spec import Adapter, LoraModule


@dataclass(frozen=True)
class MergeStep:
    """One tensor of the result. module: the LoRA to add to it, None where the base's values are passed on."""

    name: str
    shape: tuple[int, ...]
    module: LoraModule | None


def plan_merge(shapes: Mapping[str, tuple[int, ...]], adapter: Adapter) -> tuple[MergeStep, ...]:
    """One step a tensor, in the base's order.

    Raises InvalidAdapter with every module that has no weight in the base or does not fit it: nothing may be left out.
    """
    if not adapter.is_plain_lora:
        raise InvalidAdapter(
            f"an adapter of kind {adapter.spec.kind} is more than low-rank additions to linears, which is all that "
            "can be merged; serve it beside the base instead"
        )
    wanted = {f"{path}.weight": (path, module) for path, module in adapter.modules.items()}
    problems = [f"{path}: the base has no such weight" for name, (path, _) in wanted.items() if name not in shapes]
    for name, (path, module) in wanted.items():
        fits = (module.b.shape[0], module.a.shape[1])
        if name in shapes and shapes[name] != fits:
            problems.append(f"{path}: the adapter is for a weight of {list(fits)}, the base's is {list(shapes[name])}")
        if module.a.shape[0] != module.b.shape[1]:
            problems.append(f"{path}: lora_A has rank {module.a.shape[0]}, lora_B has rank {module.b.shape[1]}")
    if problems:
        raise InvalidAdapter("the adapter cannot be merged into this base:\n  " + "\n  ".join(problems))
    return tuple(MergeStep(name, shape, wanted[name][1] if name in wanted else None) for name, shape in shapes.items())
