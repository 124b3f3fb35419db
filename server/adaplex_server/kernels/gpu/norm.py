"""Root-mean-square and layer norm of rows on the GPU, with the residual addition before it in the same launch. Sums in
float32, one program a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.gpu.launch import next_power_of_2


def add_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    center: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, delta [T, H] -> (x + delta, its norm); the sum is rounded to x's dtype before it is normed. center: layer norm
    (mean removed).
    """
    x = x.contiguous()
    rows, width = x.shape
    normed = torch.empty_like(x)
    total = torch.empty_like(x) if delta is not None else x
    block = next_power_of_2(width)
    if rows:
        _add_norm[(rows,)](
            x, delta.contiguous() if delta is not None else x, weight, bias if bias is not None else weight, x, total,
            normed, width, eps, ADD=delta is not None, CENTER=center, BIAS=bias is not None, SOME=False, BLOCK=block,
            num_warps=_warps(block),
        )  # fmt: skip
    return total, normed


def add_norm_of_some(
    x: torch.Tensor,
    delta: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    center: bool,
    total: torch.Tensor,
    normed: torch.Tensor,
) -> None:
    """Write `add_norm` of the rows whose slot [T] int32 is not negative into total and normed [T, H]; all are
    contiguous.
    """
    rows, width = x.shape
    block = next_power_of_2(width)
    if rows:
        _add_norm[(rows,)](
            x.contiguous(), delta, weight, bias if bias is not None else weight, slots, total, normed, width, eps,
            ADD=True, CENTER=center, BIAS=bias is not None, SOME=True, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip


def _warps(block: int) -> int:
    return min(8, max(1, block // 512))


@triton.jit
def normed(x, i, mask, weight_ptr, bias_ptr, eps, width, CENTER: tl.constexpr, BIAS: tl.constexpr) -> tl.tensor:
    """The norm of a row x [1, BLOCK] float32 (zeros where not mask), in float32."""
    if CENTER:
        x = tl.where(mask, x - tl.sum(x, 1, keep_dims=True) / width, 0.0)
    y = (
        x
        * tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / width + eps)
        * tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    )
    if BIAS:
        y += tl.load(bias_ptr + i, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _add_norm(
    x_ptr,
    delta_ptr,
    weight_ptr,
    bias_ptr,
    slots_ptr,
    total_ptr,
    normed_ptr,
    width,
    eps,
    ADD: tl.constexpr,
    CENTER: tl.constexpr,
    BIAS: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if SOME:
        if tl.load(slots_ptr + tl.program_id(0)) < 0:
            return
    i = tl.arange(0, BLOCK)[None, :]
    mask = i < width
    at = tl.program_id(0).to(tl.int64) * width + i
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(delta_ptr + at, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + at, x, mask=mask)
    y = normed(x.to(tl.float32), i, mask, weight_ptr, bias_ptr, eps, width, CENTER, BIAS)
    tl.store(normed_ptr + at, y.to(normed_ptr.dtype.element_ty), mask=mask)
