"""Linears with 8-bit weights on the GPU: weight-only codes with groups (`kernels.int8`), and LLM.int8
(`kernels.llm_int8`), in bfloat16 or float16.

As in `kernels.gpu.linear16` sums run over k in steps of the tensor core, in one order for every M, so that a row's
result does not depend on who shares the batch. LLM.int8's sums of integers are exact; its outliers are added in the
order of k, and a tile without any is skipped, which adds nothing and so changes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.gpu.launch import cdiv, next_power_of_2

_MOST_ROWS = 128
_BLOCK_N = 64


def linear8(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K] to [M, N] in x's dtype. codes: [N, K] int8; scales, zeros: [N, G]; group: a multiple of 32, or K.

    sum_k x[m, k] * (codes[n, k] - zeros[n, g]) * scales[n, g], each group's sum in float32 before it is scaled.
    """
    (m, k), n = x.shape, codes.shape[0]
    if group < k and group % 32:
        raise ValueError(f"groups of {group} in-features cannot be multiplied: need a multiple of 32")
    x = x.contiguous()
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block_m = _block_m(m)
    if m:
        _weight_only[(cdiv(m, block_m), cdiv(n, _BLOCK_N))](
            x, codes, scales, zeros if zeros is not None else codes, bias if bias is not None else x, y,
            m, n, k, min(group, k), scales.shape[1],
            BLOCK_M=block_m, BLOCK_N=_BLOCK_N, BLOCK_K=32 if group < k and group % 64 else 64,
            ZEROS=zeros is not None, BIAS=bias is not None, num_warps=4, num_stages=3,
        )  # fmt: skip
    return y


def llm_int8(
    x: torch.Tensor,
    rows: torch.Tensor,
    largest: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    threshold: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K], quantized to rows [M, K] int8 with largest [M] float32, to [M, N] in x's dtype.

    codes: [N, K] int8; absmax: [N] float32; all contiguous.
    """
    (m, k), n = x.shape, codes.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block_m = _block_m(m)
    if m:
        _llm_int8[(cdiv(m, block_m), cdiv(n, _BLOCK_N))](
            x.contiguous(), rows, largest, codes, absmax, bias if bias is not None else x, y, m, n, k,
            threshold if threshold > 0 else float("inf"),
            BLOCK_M=block_m, BLOCK_N=_BLOCK_N, BLOCK_K=64, BIAS=bias is not None, num_warps=4, num_stages=2,
        )  # fmt: skip
    return y


def _block_m(rows: int) -> int:
    return min(_MOST_ROWS, max(16, next_power_of_2(rows)))


@triton.jit(do_not_specialize=["M"])
def _weight_only(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    group,
    groups,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One tile [BLOCK_N, BLOCK_M] of y^T. A step of k lies within one group."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    n_load = tl.minimum(n, N - 1).to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in tl.range(0, K, BLOCK_K):
        inside = first + k < K
        codes = tl.load(codes_ptr + n_load[:, None] * K + first + k[None, :], mask=inside[None, :], other=0)
        x = tl.load(
            x_ptr + m[None, :].to(tl.int64) * K + first + k[:, None],
            mask=(m[None, :] < M) & inside[:, None],
            other=0.0,
        )
        at = n_load * groups + first // group
        # At most 255 in magnitude, which all 16-bit types hold.
        wide = codes.to(tl.float32)
        if ZEROS:
            wide -= tl.load(zeros_ptr + at).to(tl.float32)[:, None]
        part = tl.dot(wide.to(x.dtype), x, input_precision="ieee")
        acc += part * tl.load(scales_ptr + at).to(tl.float32)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + n_load)[:, None].to(tl.float32)
    out = y_ptr + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(m[None, :] < M) & (n < N)[:, None])


@triton.jit(do_not_specialize=["M"])
def _llm_int8(
    x_ptr,
    rows_ptr,
    largest_ptr,
    codes_ptr,
    absmax_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    limit,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One tile [BLOCK_N, BLOCK_M] of y^T."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    n_load = tl.minimum(n, N - 1).to(tl.int64)
    absmax = tl.load(absmax_ptr + n_load)
    whole = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    outer = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in tl.range(0, K, BLOCK_K):
        inside = first + k < K
        codes = tl.load(codes_ptr + n_load[:, None] * K + first + k[None, :], mask=inside[None, :], other=0)
        at = m[None, :].to(tl.int64) * K + first + k[:, None]
        live = (m[None, :] < M) & inside[:, None]
        whole += tl.dot(codes, tl.load(rows_ptr + at, mask=live, other=0), out_dtype=tl.int32)
        x = tl.load(x_ptr + at, mask=live, other=0.0)
        outlier = tl.abs(x.to(tl.float16).to(tl.float32)) >= limit
        if tl.max(tl.max(outlier.to(tl.int32), 1), 0) > 0:
            weight = codes.to(tl.float32) * absmax[:, None] * 7.874015718698502e-3
            kept = tl.where(outlier, x, 0.0).to(x.dtype)
            outer += tl.dot(weight.to(x.dtype), kept, input_precision="ieee")
    largest = tl.load(largest_ptr + m, mask=m < M, other=0.0)
    y = whole.to(tl.float32) * (largest[None, :] * absmax[:, None]) * 6.200124e-05
    if BIAS:
        y += tl.load(bias_ptr + n_load)[:, None].to(tl.float32)
    # Rounded before the outliers are added, as the reference does.
    y = y.to(y_ptr.dtype.element_ty).to(tl.float32) + outer
    out = y_ptr + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(m[None, :] < M) & (n < N)[:, None])
