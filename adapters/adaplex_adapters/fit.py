"""Whether an adapter fits a base: every tensor has a linear of its shape, every targeted linear has its tensors."""

from __future__ import annotations

from adaplex_adapters.automaton import WorkBudget
from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.patterns import TargetRule
from adaplex_adapters.peft_config import CONFIG_FILE, LoraConfigFile
from adaplex_adapters.problems import raise_if_any, refusal, shown
from adaplex_adapters.spec import LoraAdapter


def check_fit(adapter: LoraAdapter, config: LoraConfigFile, base: BaseShape, budget: WorkBudget) -> None:
    """Raise InvalidAdapter unless the adapter fits. Says "wrong base" when most of it does not."""
    unknown = [path for path in adapter.modules if path not in base.linears]
    misshapen = [p for path in adapter.modules if path in base.linears and (p := _shape_problem(adapter, path, base))]
    if unknown or misshapen:
        problems = [f"Module {path} is not an adaptable module of the base." for path in unknown] + misshapen
        if 2 * len(problems) > len(adapter.modules):
            problems.insert(0, _wrong_base(config, base))
        raise refusal(problems)
    rule = TargetRule(config, budget)
    targeted = rule.targets(base.linears)
    raise_if_any(
        [
            f"Module {path} is targeted by {CONFIG_FILE} but has no tensors; the adapter is incomplete."
            for path in targeted
            if path not in adapter.modules
        ]
        + [
            f"Module {path} has tensors but is not targeted by {CONFIG_FILE}; PEFT would leave them unused."
            for path in sorted(adapter.modules.keys() - set(targeted))
        ]
        + [
            f"target_modules in {CONFIG_FILE} names {shown(name)}, which no adapted module of {base.name} "
            "has; take it out if it is not needed."
            for name in rule.names_without(targeted)
        ]
    )


def _shape_problem(adapter: LoraAdapter, path: str, base: BaseShape) -> str | None:
    module, linear = adapter.modules[path], base.linears[path]
    rank = module.a.shape[0]
    expected = [rank, linear.in_features], [linear.out_features, rank]
    found = list(module.a.shape), list(module.b.shape)
    if found == expected:
        return None
    return f"Module {path} has A {found[0]}, B {found[1]}; the base: {expected[0]}, {expected[1]}."


def _wrong_base(config: LoraConfigFile, base: BaseShape) -> str:
    made_for = f" It was made for {shown(config.base_model)}." if config.base_model else ""
    return f"Wrong base: the adapter does not fit {base.name} ({base.family}, {base.num_layers} layers).{made_for}"
