"""Linears in eight bits: weight-only (absmax, zero-point, 8-bit GPTQ) and LLM.int8, and how bitsandbytes saves the
latter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaplex_adapters.errors import StartupError
from adaplex_server.kernels import int8, llm_int8
from adaplex_server.model.checkpoint import Checkpoint
from adaplex_server.model.formats.whole import WholeLinear


@dataclass(frozen=True)
class Int8Linear(WholeLinear[int8.Int8Weight]):
    """Multiplies with `kernels.int8.linear`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return int8.linear(x, self.weight, self.bias)

    def dequantized(self) -> torch.Tensor:
        return int8.dequantize(self.weight)


@dataclass(frozen=True)
class LlmInt8Linear(WholeLinear[llm_int8.LlmInt8Weight]):
    """Multiplies with `kernels.llm_int8.linear`, which quantizes activations too."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return llm_int8.linear(x, self.weight, self.bias)

    def dequantized(self) -> torch.Tensor:
        return llm_int8.dequantize(self.weight)


def is_llm_int8(checkpoint: Checkpoint, path: str) -> bool:
    """Whether the module was quantized at all."""
    return f"{path}.SCB" in checkpoint


def read_llm_int8(
    checkpoint: Checkpoint, path: str, rows: int, columns: int, threshold: float, device: torch.device
) -> llm_int8.LlmInt8Weight:
    """One module's weight [rows, columns] as bitsandbytes' Linear8bitLt saves it: weight, SCB and weight_format."""
    codes = checkpoint.read(f"{path}.weight", (rows, columns))
    absmax = checkpoint.read(f"{path}.SCB", (rows,))
    layout = checkpoint.read_if_there(f"{path}.weight_format", ())
    if codes.dtype != torch.int8 or not absmax.is_floating_point():
        raise StartupError(f"{path}: weight is {codes.dtype} and SCB {absmax.dtype}; expected int8 and floating point")
    if layout is not None and int(layout) != 0:
        raise StartupError(f"{path}.weight_format is {int(layout)}, a layout of old GPUs; only 0 (row) is supported")
    return llm_int8.LlmInt8Weight(codes.to(device, copy=True), absmax.to(device, torch.float32, copy=True), threshold)
