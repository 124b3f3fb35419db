"""Factors on the outputs or inputs of linears: DoRA's and IA3's, as one page of an adapter's image.

    DoRA (Liu et al. 2024)   y = m / |W + s B A| * (W x + s B A x) + bias     |.|: the length of each row, W dequantized
    IA3 (Liu et al. 2022)    y = (W x + bias) * v,  or  y = W (x * v) + bias  on the output, or on the input

A page of rank rows has room for a factor of every output and of every input of each fused linear: row 0 of b holds the
outputs' [N], row 2 the bias's, row 0 of a's first target the inputs' [K]; rows 1, 3 and 1 hold what the rows before
them lost by rounding to the pool's dtype, so that a factor has twice its precision. What an adapter leaves alone has
the factor 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.spec import Adapter, LoraModule
from adaplex_server.kernels.factors import FactorPlan
from adaplex_server.model.base import Base
from adaplex_server.model.config import ModelConfig
from adaplex_server.model.families import base_shape, linear_targets, module_paths
from adaplex_server.model.upload import upload

INPUT_LINEARS = ("o", "down")
"""Where a factor on the input can be served: linears that share their input with nobody."""

Place = tuple[str, int]
"""A fused linear of a layer."""


@dataclass(frozen=True)
class Factors:
    """Of an adapter: outputs [N], biases [N] and inputs [K] float32 by place; used: tensors of the adapter that are in
    them.
    """

    outputs: Mapping[Place, torch.Tensor]
    biases: Mapping[Place, torch.Tensor]
    inputs: Mapping[Place, torch.Tensor]
    used: int


def has_factors(adapter: Adapter, config: ModelConfig) -> bool:
    """Whether the adapter has some on the layers' linears."""
    head = base_shape(config).head
    return any(path != head for path in adapter.scales) or any(
        path != head and module.magnitude is not None for path, module in adapter.modules.items()
    )


def factors_of(adapter: Adapter, base: Base | None, config: ModelConfig) -> Factors | None:
    """The adapter's, if it has any. base: needed for DoRA. Raises InvalidAdapter for a factor that cannot be served."""
    outputs: dict[Place, torch.Tensor] = {}
    biases: dict[Place, torch.Tensor] = {}
    inputs: dict[Place, torch.Tensor] = {}
    used = 0
    for linear, targets in linear_targets(config).items():
        for layer in range(config.num_layers):
            for path, span in zip(module_paths(config, layer, linear), targets.spans, strict=True):
                module, scale = adapter.modules.get(path), adapter.scales.get(path)
                if module is not None and module.magnitude is not None:
                    assert base is not None, "a DoRA is laid out without its base"
                    own = outputs.setdefault((linear, layer), torch.ones(targets.out_features))
                    own[slice(*span)] = _dora_factor(base, layer, linear, span, module)
                    used += 1
                if scale is not None and scale.on == "output":
                    for parts in (outputs, biases):
                        own = parts.setdefault((linear, layer), torch.ones(targets.out_features))
                        own[slice(*span)] *= scale.vector.float()
                    used += 1
                elif scale is not None:
                    if linear not in INPUT_LINEARS:
                        raise InvalidAdapter(f"{path}: a factor on the input of this module cannot be served")
                    inputs[linear, layer] = scale.vector.float()
                    used += 1
    return Factors(outputs, biases, inputs, used) if used else None


def place_factors(factors: Factors, page: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Put the factors into a page of zeros. page: by linear, its a [layers, RANK_PAGE, G, K] and b [layers, RANK_PAGE,
    N]. Returns how many tensors of the adapter have found their place.
    """
    for linear, (a, b) in page.items():
        a[:, 0, 0] = 1
        b[:, 0] = 1
        b[:, 2] = 1
        for parts, rows in ((factors.outputs, b), (factors.biases, b[:, 2:]), (factors.inputs, a[:, :, 0])):
            for (name, layer), values in parts.items():
                if name == linear:
                    _split(values, rows[layer])
    return factors.used


def _split(values: torch.Tensor, rows: torch.Tensor) -> None:
    rows[0] = values
    rows[1] = values - rows[0].float()


def _dora_factor(base: Base, layer: int, linear: str, span: tuple[int, int], module: LoraModule) -> torch.Tensor:
    """[out] float32: the learned length of each row over the length that it has with the LoRA added."""
    assert module.magnitude is not None
    device = base.device
    weight = base.layers[layer].linears[linear].dequantized()[slice(*span)].float()
    delta = module.b.to(device).float() @ module.a.to(device).float()
    length = torch.linalg.norm(torch.add(weight, delta, alpha=module.scaling), dim=1).cpu()
    return module.magnitude.float() / length


def plan_factors(
    row_tokens: Sequence[int], row_slots: Sequence[int], factor_rows: Mapping[int, int], device: torch.device
) -> FactorPlan | None:
    """For the rows of a step; None when none has factors. factor_rows: of the slots that have some."""
    spans, begin = [], 0
    for count, slot in zip(row_tokens, row_slots, strict=True):
        row = factor_rows.get(slot)
        if row is not None and count:
            spans.append((begin, begin + count, row))
        begin += count
    if not spans:
        return None
    index = [-1] * begin
    for first, end, row in spans:
        index[first:end] = [row] * (end - first)
    return FactorPlan(upload(index, torch.int32, device), tuple(spans))
