"""bitsandbytes' four-bit linears on a GPU, expanded by one kernel: scales quantized twice, codes and product at once.

The tensors are those of the bitsandbytes module; nothing is copied. Values equal bitsandbytes' own.
"""

from __future__ import annotations

from typing import Any

import torch

from adaplex_adapters.training.expanded_linear import ExpandedLinear


class FourBitLinear(ExpandedLinear):
    """codes: [out * in / 2] uint8. absmax: a scale a block, float32, or uint8 beside the tensors of double
    quantization. table: the 16 values of a code.
    """

    codes: torch.Tensor
    table: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor
    nested_table: torch.Tensor
    nested_offset: torch.Tensor

    def __init__(self, linear: Any) -> None:
        state = linear.weight.quant_state
        super().__init__(linear.in_features, linear.out_features, linear.bias, linear.compute_dtype or torch.bfloat16)
        self.block = int(state.blocksize)
        self.nested_block = int(state.state2.blocksize) if state.nested else 0
        self.register_buffer("codes", linear.weight.data.reshape(-1).view(torch.uint8))
        self.register_buffer("table", state.code.float())
        self.register_buffer("absmax", state.absmax)
        if state.nested:
            self.register_buffer("nested_absmax", state.state2.absmax.float())
            self.register_buffer("nested_table", state.state2.code.float())
            self.register_buffer("nested_offset", state.offset.float().reshape(()))

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in]; the product of code and scale is rounded once."""
        from adaplex_adapters.training.fused import gpu_kernels

        out = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.codes.device)
        nested = None
        if self.nested_block:
            nested = (self.nested_absmax, self.nested_table, self.nested_offset, self.nested_block)
        gpu_kernels.expand4(self.codes, self.table, self.absmax, nested, self.block, out)
        return out


def take_over(model: Any) -> None:
    """Replace every four-bit linear of bitsandbytes on a GPU whose blocks fill whole kernels."""
    for path, layer in list(model.named_modules()):
        if type(layer).__name__ != "Linear4bit" or not layer.weight.is_cuda:
            continue
        block = int(layer.weight.quant_state.blocksize)
        if layer.in_features * layer.out_features % block == 0:
            model.set_submodule(path, FourBitLinear(layer))
