"""The activation of an MLP on the GPU, gated (act(gate) * up) or plain, in one pass with float32 arithmetic."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.gpu.launch import cdiv

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


def activate(x: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """x [T, F] -> act(x), or gated: x [T, 2F] (gate, up) -> act(gate) * up [T, F]. activation: "silu", "gelu",
    "gelu_tanh" or "relu".
    """
    x = x.contiguous()
    rows, width = x.shape
    if gated:
        width //= 2
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        _activate[(rows, cdiv(width, 1024))](x, y, width, KIND=KINDS[activation], GATED=gated, BLOCK=1024, num_warps=4)
    return y


@triton.jit
def act(x, KIND: tl.constexpr) -> tl.tensor:
    """act(x), float32 to float32."""
    if KIND == 0:
        y = x / (1.0 + tl.exp(-x))
    elif KIND == 1:
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif KIND == 2:
        # 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def _activate(x_ptr, y_ptr, width, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width
    x_row = x_ptr + row * width * (2 if GATED else 1)
    x = tl.load(x_row + i, mask=mask, other=0.0).to(tl.float32)
    y = act(x, KIND)
    if GATED:
        y *= tl.load(x_row + width + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + i, y.to(y_ptr.dtype.element_ty), mask=mask)
