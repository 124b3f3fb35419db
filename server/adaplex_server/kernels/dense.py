"""Dense linears whose rows do not depend on how many rows there are.

A BLAS picks its way of summing by the number of rows; on CPUs with MKL and oneDNN the ways for few rows differ from
the others in the last bits. Padding to a multiple of eight rows (float32) or to two rows (the 16-bit types) keeps to
one way, so that each row's sums depend on its own input and on the weight's shape alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [M, K], weight: [N, K], bias: [N], all of one dtype. Returns [M, N]."""
    rows = x.shape[0]
    if not x.is_cpu:
        return F.linear(x, weight, bias)
    padding = -rows % 8 if x.dtype == torch.float32 else int(rows == 1)
    if not padding:
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, padding)), weight, bias)[:rows]
