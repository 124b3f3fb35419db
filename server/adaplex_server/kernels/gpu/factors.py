"""Factors on inputs and outputs on the GPU, one program a token and block of features."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.gpu.launch import cdiv

_BLOCK = 1024


def scale_inputs(x: torch.Tensor, a: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [T, K] times each token's factors, a [pool rows, G, K] at rows index and index + 1 of target 0."""
    tokens, k = x.shape
    out = torch.empty(tokens, k, dtype=x.dtype, device=x.device)
    if tokens:
        _scale_inputs[(tokens, cdiv(k, _BLOCK))](x, a, index, out, x.stride(0), a.stride(0), K=k, BLOCK=_BLOCK)
    return out


def scale_outputs(y: torch.Tensor, b: torch.Tensor, index: torch.Tensor, bias: torch.Tensor | None) -> None:
    """y [T, N] (contiguous) with its factors and bias, in place; b [pool rows, N] at rows index to index + 3."""
    tokens, n = y.shape
    if tokens:
        _scale_outputs[(tokens, cdiv(n, _BLOCK))](
            y, b, index, y if bias is None else bias, N=n, BIAS=bias is not None, BLOCK=_BLOCK
        )


@triton.jit(do_not_specialize_on_alignment=["index_ptr"])
def _scale_inputs(x_ptr, a_ptr, index_ptr, out_ptr, x_stride, a_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = k < K
    x = tl.load(x_ptr + token * x_stride + k, mask=mask, other=0.0)
    row = tl.load(index_ptr + token).to(tl.int64)
    if row >= 0:
        at = a_ptr + row * a_stride + k
        factor = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        factor += tl.load(at + a_stride, mask=mask, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * factor).to(x.dtype)
    tl.store(out_ptr + token * K + k, x, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["index_ptr"])
def _scale_outputs(y_ptr, b_ptr, index_ptr, bias_ptr, N: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + token).to(tl.int64)
    if row < 0:
        return
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    y = tl.load(y_ptr + token * N + n, mask=mask, other=0.0).to(tl.float32)
    at = b_ptr + row * N + n
    factor = tl.load(at, mask=mask, other=0.0).to(tl.float32) + tl.load(at + N, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
        kept = tl.load(at + 2 * N, mask=mask, other=0.0).to(tl.float32)
        kept += tl.load(at + 3 * N, mask=mask, other=0.0).to(tl.float32)
        y = (y - bias) * factor + bias * kept
    else:
        y = y * factor
    tl.store(y_ptr + token * N + n, y.to(y_ptr.dtype.element_ty), mask=mask)
