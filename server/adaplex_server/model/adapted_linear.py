"""A linear of the base with the adapters of its tokens: the one place that chooses how both are multiplied.

On a GPU and for few tokens the product and h = A x are left to whoever takes the result to be put together
(`kernels.finish`), with what follows in the same launch. Elsewhere the deltas are added to the product; on a GPU a
gated activation is computed in the same pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from adaplex_server.kernels import dense
from adaplex_server.kernels.factors import FactorPlan, scale_inputs, scale_outputs
from adaplex_server.kernels.finish import OutputScale, Unfinished, finish_activation
from adaplex_server.kernels.lora import LoraPlan, add_lora, add_lora_and_activate, shrink, unshrunk
from adaplex_server.kernels.lora_tiles import FEW_TOKENS
from adaplex_server.model.factors import INPUT_LINEARS
from adaplex_server.model.formats.dense import DenseLinear
from adaplex_server.model.formats.gptq import GpuGptqLinear
from adaplex_server.model.formats.nf4 import GpuNf4Linear
from adaplex_server.model.linear import Linear


@dataclass(frozen=True)
class Factored:
    """What the factors of a step's tokens are multiplied from: the pool's rows of a layer's linear."""

    plan: FactorPlan
    a: torch.Tensor
    b: torch.Tensor


def adapted_linear(
    base: Linear,
    x: torch.Tensor,
    lora: LoraPlan | None,
    linear: str,
    layer: int,
    factors: Factored | None = None,
) -> torch.Tensor | Unfinished:
    """x [T, K] to [T, N]: the base's output plus the delta of each token's own adapter, times its factors.

    lora: None where no token has an adapter. linear, layer: where `base` stands in the decoder, which is how the plan
    finds the adapters' rank rows. factors: None where no token has any.
    """
    if factors is not None and linear in INPUT_LINEARS:
        x = scale_inputs(x, factors.a, factors.plan)
    if x.is_cuda and 0 < x.shape[0] <= FEW_TOKENS:
        few = _few(base, x, lora, linear, layer)
        return few if factors is None else replace(few, scale=OutputScale(factors.b, factors.plan.index))
    y = base(x)
    if lora is not None:
        add_lora(y, x, lora, linear, layer)
    if factors is not None:
        scale_outputs(y, factors.b, factors.plan, base.bias)
    return y


def _few(base: Linear, x: torch.Tensor, lora: LoraPlan | None, linear: str, layer: int) -> Unfinished:
    found = None if lora is None else unshrunk(x, lora, linear, layer)
    parts, bias = _product(base, x)
    if lora is not None and found is not None:
        ours = isinstance(base, GpuNf4Linear | GpuGptqLinear) and x.dtype != torch.float32
        shrink(found, x, lora, linear, layer, beside=ours)
    return Unfinished(parts, x.dtype, bias, found)


def adapted_activation(
    base: Linear,
    x: torch.Tensor,
    lora: LoraPlan | None,
    linear: str,
    layer: int,
    activation: str,
    gated: bool,
    factors: Factored | None = None,
) -> torch.Tensor:
    """`kernels.activation.activate` of `adapted_linear`."""
    if lora is None or factors is not None or not gated or not x.is_cuda or x.shape[0] <= FEW_TOKENS:
        return finish_activation(adapted_linear(base, x, lora, linear, layer, factors), activation, gated)
    return add_lora_and_activate(base(x), x, lora, linear, layer, activation)


def _product(base: Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Parts [S, T, N], and the bias if it is not in them."""
    if isinstance(base, GpuNf4Linear | GpuGptqLinear):
        from adaplex_server.kernels.gpu.linear4 import product

        order = base.exact.order if isinstance(base, GpuGptqLinear) else None
        return product(x if order is None else x.index_select(1, order), base.packed), base.bias
    if isinstance(base, DenseLinear):
        return dense.linear(x, base.weight)[None], base.bias
    return base(x)[None], None
