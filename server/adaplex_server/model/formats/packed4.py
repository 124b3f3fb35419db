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

    if packed.columns == 0:
        return _from_codes(packed, scales, zeros)

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


def _from_codes(packed: Packed4, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """The same of a weight in the layout of `kernels.cuda`, some rows at a time."""
    from adaplex_server.kernels.cuda.layout4 import unpack_words

    device = packed.words.device
    codes = unpack_words(packed.words, packed.n, packed.k)
    out = torch.empty(packed.n, packed.k, device=device)
    for begin in range(0, packed.n, 2048):
        rows = slice(begin, begin + 2048)
        values = packed.table[codes[rows].int()]
        if packed.zeros is not None and zeros is not None:
            values -= _by_feature(zeros[rows].to(device, torch.float32) - 8, packed.group, packed.k)
        out[rows] = values * _by_feature(scales[rows].to(device, torch.float32), packed.group, packed.k)
    return out


def _by_feature(values: torch.Tensor, group: int, k: int) -> torch.Tensor:
    """[N, G] to [N, K]."""
    return values.repeat_interleave(group, dim=1)[:, :k]
