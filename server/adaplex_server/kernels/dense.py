"""Dense linears whose rows do not depend on how many rows there are.

A BLAS picks its way of summing by the number of rows; on CPUs with MKL and oneDNN the ways for few rows differ from
the others in the last bits. Padding to a multiple of eight rows (float32) or to two rows (the 16-bit types) keeps to
one way, so that each row's sums depend on its own input and on the weight's shape alone. On GPUs our own kernel
holds to the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x: [M, K], weight: [N, K], bias: [N], all of one dtype. Returns [M, N] in out_dtype (None: x's)."""
    if x.is_cuda:
        from adaplex_server.kernels.gpu.linear16 import linear16

        return linear16(x, weight, bias, out_dtype)
    rows = x.shape[0]
    padding = -rows % 8 if x.dtype == torch.float32 else int(rows == 1)
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    return F.linear(x, weight, bias)[:rows].to(out_dtype or x.dtype)
