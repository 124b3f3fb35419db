"""The exact values of a weight that the GPU keeps with rounded scales."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from adaplex_server.kernels.gpu.linear4 import Packed4


def dequantize_exact(packed: Packed4, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """[N, K] float32 on the device, in the order of the codes. scales, zeros: [N, G] on any device, as they were
    before packing.
    """
    from adaplex_server.kernels.gpu.linear4 import dequantize4

    def laid_out(values: torch.Tensor) -> torch.Tensor:
        columns = values.to(packed.words.device, torch.float32).t()
        return torch.nn.functional.pad(columns, (0, 0, 0, packed.scales.shape[0] - columns.shape[0])).contiguous()

    exact = replace(
        packed,
        dtype=torch.float32,
        scales=laid_out(scales),
        zeros=None if packed.zeros is None or zeros is None else laid_out(zeros.float() - 8),
    )
    return dequantize4(exact)
