"""A linear of the base with the adapters of its tokens: the one place that chooses how both are multiplied.

On a GPU and for few tokens the product and h = A x are left to whoever takes the result to be put together
(`kernels.finish`), with what follows in the same launch. Elsewhere the deltas are added to the product; on a GPU a
gated activation is computed in the same pass.
"""

from __future__ import annotations

import torch

from adaplex_server.kernels.finish import Shrunk, Unfinished, finish_activation
from adaplex_server.kernels.lora import LoraPlan, add_lora, add_lora_and_activate, shrunk
from adaplex_server.kernels.lora_tiles import FEW_TOKENS
from adaplex_server.model.formats.gptq import GpuGptqLinear
from adaplex_server.model.formats.nf4 import GpuNf4Linear
from adaplex_server.model.linear import Linear


def adapted_linear(
    base: Linear, x: torch.Tensor, lora: LoraPlan | None, linear: str, layer: int
) -> torch.Tensor | Unfinished:
    """x [T, K] to [T, N]: the base's output plus the delta of each token's own adapter.

    lora: None where no token has an adapter. linear, layer: where `base` stands in the decoder, which is how the plan
    finds the adapters' rank rows.
    """
    if x.is_cuda and 0 < x.shape[0] <= FEW_TOKENS:
        if lora is None:
            return _unfinished(base, x, None)
        side = lora.side if torch.cuda.is_current_stream_capturing() else None
        if side is None:
            return _unfinished(base, x, shrunk(x, lora, linear, layer))
        current = torch.cuda.current_stream(x.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            found = shrunk(x, lora, linear, layer)
        result = _unfinished(base, x, found)
        current.wait_stream(side)
        return result
    y = base(x)
    if lora is not None:
        add_lora(y, x, lora, linear, layer)
    return y


def adapted_activation(
    base: Linear, x: torch.Tensor, lora: LoraPlan | None, linear: str, layer: int, activation: str, gated: bool
) -> torch.Tensor:
    """`kernels.activation.activate` of `adapted_linear`."""
    if lora is None or not gated or not x.is_cuda or x.shape[0] <= FEW_TOKENS:
        return finish_activation(adapted_linear(base, x, lora, linear, layer), activation, gated)
    return add_lora_and_activate(base(x), x, lora, linear, layer, activation)


def _unfinished(base: Linear, x: torch.Tensor, found: Shrunk | None) -> Unfinished:
    parts, bias = _product(base, x)
    return Unfinished(parts, x.dtype, bias, found)


def _product(base: Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Parts [S, T, N], and the bias if it is not in them."""
    if isinstance(base, GpuNf4Linear | GpuGptqLinear):
        from adaplex_server.kernels.gpu.linear4 import product

        order = base.exact.order if isinstance(base, GpuGptqLinear) else None
        return product(x if order is None else x.index_select(1, order), base.packed), base.bias
    return base(x)[None], None
