"""Linears in GPTQ's and AWQ's four bits (and fewer): which implementation multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adaplex_server.kernels import gptq
from adaplex_server.model.formats.packed4 import dequantize_exact
from adaplex_server.model.formats.whole import WholeLinear
from adaplex_server.model.linear import Linear

if TYPE_CHECKING:
    from adaplex_server.kernels.gpu.linear4 import Packed4


@dataclass(frozen=True)
class GptqLinear(WholeLinear[gptq.GptqWeight]):
    """Multiplies with `kernels.gptq.linear`: the weight is expanded for each call."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return gptq.linear(x, self.weight, self.bias)

    def dequantized(self) -> torch.Tensor:
        return gptq.dequantize(self.weight)


@dataclass(frozen=True)
class Exact:
    """What a weight packed in bfloat16 must keep so that its exact values can be told: scales [N, G], zeros [N, G],
    order as in GptqWeight.
    """

    in_features: int
    group: int
    scales: torch.Tensor
    zeros: torch.Tensor
    order: torch.Tensor | None

    @staticmethod
    def of(weight: gptq.GptqWeight, device: torch.device) -> Exact:
        """On `device`; order, which every product needs, stays where it is."""
        return Exact(weight.in_features, weight.group, weight.scales.to(device), weight.zeros.to(device), weight.order)

    def in_checkpoint_order(self, values: torch.Tensor) -> torch.Tensor:
        """Columns [N, K] that are in the order of the codes, put back."""
        return values if self.order is None else torch.empty_like(values).index_copy_(1, self.order, values)

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.scales.nbytes + self.zeros.nbytes + (0 if self.order is None else self.order.nbytes)


@dataclass(frozen=True)
class CpuGptqLinear:
    """Multiplies bfloat16 with torch's int4 kernel. bias: [out_features] or None."""

    weight: gptq.CpuInt4
    exact: Exact
    bias: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.exact.in_features

    @property
    def out_features(self) -> int:
        return self.exact.scales.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        order = self.exact.order
        out = gptq.cpu_matmul(x.contiguous() if order is None else x.index_select(1, order), self.weight)
        return out if self.bias is None else out.add_(self.bias)

    def dequantized(self) -> torch.Tensor:
        codes = gptq.cpu_codes(self.weight)
        values = gptq.dequantize_codes(codes, self.exact.scales, self.exact.zeros, self.exact.group)
        return self.exact.in_checkpoint_order(values)

    def nbytes(self) -> int:
        bias = self.bias.nbytes if self.bias is not None else 0
        return self.weight.packed.nbytes + self.weight.scale_shift.nbytes + self.exact.nbytes() + bias


@dataclass(frozen=True)
class GpuGptqLinear:
    """Multiplies with our own GPU kernel. exact: scales and zeros on the host, as only `dequantized` needs them.
    bias: [out_features] or None.
    """

    packed: Packed4
    exact: Exact
    bias: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.exact.in_features

    @property
    def out_features(self) -> int:
        return self.exact.scales.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        from adaplex_server.kernels.gpu.linear4 import linear4

        order = self.exact.order
        return linear4(x if order is None else x.index_select(1, order), self.packed, self.bias)

    def dequantized(self) -> torch.Tensor:
        values = dequantize_exact(self.packed, self.exact.scales, self.exact.zeros)
        return self.exact.in_checkpoint_order(values)

    def nbytes(self) -> int:
        order = 0 if self.exact.order is None else self.exact.order.nbytes
        return self.packed.nbytes() + order + (self.bias.nbytes if self.bias is not None else 0)


def gptq_linear(weight: gptq.GptqWeight, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
    """The fastest implementation for where the weight is and for activations of `dtype`."""
    if weight.codes.is_cuda and dtype != torch.float32 and weight.group % 32 == 0:
        return _on_gpu(weight, bias, dtype)
    if dtype == torch.bfloat16:
        packed = gptq.cpu_int4(weight)
        if packed is not None:
            return CpuGptqLinear(packed, Exact.of(weight, weight.codes.device), bias)
    return GptqLinear(weight, bias)


def _on_gpu(weight: gptq.GptqWeight, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
    from adaplex_server.kernels.gpu.linear4 import pack

    zeros = None if bool((weight.zeros == 8).all()) else weight.zeros
    codes = gptq.unpack_pairs(weight.codes, weight.in_features)
    packed = pack(codes, weight.scales, zeros, "int4", weight.group, dtype, weight.codes.device)
    return GpuGptqLinear(packed, Exact.of(weight, torch.device("cpu")), bias)
