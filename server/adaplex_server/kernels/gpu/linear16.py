"""A dense linear for few rows on the GPU, in bfloat16 or float16: y[m, n] = sum_k x[m, k] * w[n, k] (+ bias[n]).

What cuBLAS would do as fast, but it chooses another order of sums for another number of rows. Here the order is that of
k, in steps of the tensor core, for every M, so that a row's result does not depend on who shares the batch. The head
uses it for any M, with float32 results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.cuda import linear16 as hopper
from adaplex_server.kernels.gpu.launch import INTERPRETED, cdiv, next_power_of_2

FEW_ROWS = 128


def linear16(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [M, K], weight [N, K] (contiguous, one dtype) to [M, N] in out_dtype (x's when None). float32 goes to torch."""
    m, k = x.shape
    n = weight.shape[0]
    plain = x.dtype == torch.float32 and not INTERPRETED
    if m == 0 or plain or (m > FEW_ROWS and out_dtype in (None, x.dtype)):
        return torch.nn.functional.linear(x, weight, bias).to(out_dtype or x.dtype)
    if hopper.usable(x, weight):
        return hopper.linear16(x, weight, bias, out_dtype or x.dtype)
    y = torch.empty(m, n, dtype=out_dtype or x.dtype, device=x.device)
    block_m = min(128, max(16, next_power_of_2(m)))
    block_n, warps = (128, 8) if n >= 16384 else (64, 4) if n >= 8192 else (32, 4)
    _product[(cdiv(m, block_m), cdiv(n, block_n))](
        x.contiguous(),
        weight,
        bias if bias is not None else weight,
        y,
        m,
        n,
        k,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=64 if block_m > 64 else 128,
        BIAS=bias is not None,
        EVEN_K=k % 128 == 0,
        num_warps=warps,
        num_stages=3,
    )
    return y


@triton.jit(do_not_specialize=["M"])
def _product(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One tile [BLOCK_N, BLOCK_M] of y^T."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m_mask = m[None, :] < M
    n_load = tl.minimum(n, N - 1)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    x_tile = x_ptr + m[None, :].to(tl.int64) * K + k[:, None]
    w_tile = w_ptr + n_load[:, None].to(tl.int64) * K + k[None, :]
    for first in tl.range(0, K, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_tile + first)
            x = tl.load(x_tile + first, mask=m_mask, other=0.0)
        else:
            w = tl.load(w_tile + first, mask=first + k[None, :] < K, other=0.0)
            x = tl.load(x_tile + first, mask=m_mask & (first + k[:, None] < K), other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + n_load)[:, None].to(tl.float32)
    out = y_ptr + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=m_mask & (n < N)[:, None])
