"""Bottlenecks on the GPU in two launches: one program a token and page of `down`, then one a token and block of
features of `up`. Each token reads its own adapter's pages, which the device finds by its slot, so that a captured step
serves whatever is in the slots by then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.bottleneck import BIAS_ROW, CODE_ROW, SCALING_ROW, BottleneckPlan
from adaplex_server.kernels.gpu.activation import act
from adaplex_server.kernels.gpu.launch import cdiv, next_power_of_2

_BLOCK_K = 512
_BLOCK_N = 256
# As constants of the kernels.
_BIAS = tl.constexpr(BIAS_ROW)
_CODES = tl.constexpr(CODE_ROW)
_SCALING = tl.constexpr(SCALING_ROW)


def add_bottlenecks(
    stream: torch.Tensor, block: torch.Tensor, down: torch.Tensor, up: torch.Tensor, plan: BottleneckPlan
) -> None:
    """See `kernels.bottleneck.add_bottlenecks`; block is contiguous."""
    tokens, width = block.shape
    if not tokens or not plan.most_pages:
        return
    stream = stream.contiguous()
    inner = torch.empty(tokens, plan.most_pages * plan.page_rows, device=block.device)
    where = (plan.slots, plan.table, plan.table.stride(0))
    _down[(tokens, plan.most_pages)](
        stream, block, down, inner, *where, down.stride(0), inner.stride(0),
        H=width, PAGE=plan.page_rows, BLOCK=min(_BLOCK_K, next_power_of_2(width)),
    )  # fmt: skip
    size = min(_BLOCK_N, next_power_of_2(width))
    _up[(tokens, cdiv(width, size))](
        block, down, up, inner, *where, down.stride(0), inner.stride(0), H=width, PAGE=plan.page_rows, BLOCK=size
    )  # fmt: skip


@triton.jit
def _activated(x, code) -> tl.tensor:
    """The activation of this code (an element of `kernels.bottleneck.ACTIVATIONS`), float32 to float32."""
    y = act(x, 3)
    y = tl.where(code == 1, act(x, 1), y)
    y = tl.where(code == 2, act(x, 2), y)
    y = tl.where(code == 3, act(x, 0), y)
    y = tl.where(code == 4, 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0, y)
    y = tl.where(code == 5, 1.0 / (1.0 + tl.exp(-x)), y)
    return tl.where(code == 6, tl.where(x > 0, x, 0.01 * x), y)


@triton.jit(do_not_specialize=["table_stride", "inner_stride"], do_not_specialize_on_alignment=["slots_ptr"])
def _down(
    stream_ptr,
    block_ptr,
    down_ptr,
    inner_ptr,
    slots_ptr,
    table_ptr,
    table_stride,
    down_stride,
    inner_stride,
    H: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """act(down x + bias) of one token and one page."""
    token = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    line = table_ptr + slot * table_stride
    if index >= tl.load(line + 1):
        return
    vectors = down_ptr + tl.load(line).to(tl.int64) * PAGE * down_stride
    reads = tl.load(vectors + _CODES * down_stride + 1).to(tl.int32)
    if reads == 0:
        return
    i = tl.arange(0, PAGE)
    rows = down_ptr + (tl.load(line + 2 + index).to(tl.int64) * PAGE + i[:, None]) * down_stride
    products = tl.zeros((PAGE, BLOCK), tl.float32)
    for first in tl.range(0, H, BLOCK):
        k = first + tl.arange(0, BLOCK)
        mask = k < H
        s = tl.load(stream_ptr + token * H + k, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(block_ptr + token * H + k, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(reads == 1, h, tl.where(reads == 2, s + h, s))
        w = tl.load(rows + k[None, :], mask=mask[None, :], other=0.0).to(tl.float32)
        products += w * x[None, :]
    own = index * PAGE + i
    bias = tl.load(vectors + _BIAS * down_stride + own).to(tl.float32)
    bias += tl.load(vectors + (_BIAS + 1) * down_stride + own).to(tl.float32)
    code = tl.load(vectors + _CODES * down_stride).to(tl.int32)
    tl.store(inner_ptr + token * inner_stride + own, _activated(tl.sum(products, 1) + bias, code))


@triton.jit(do_not_specialize=["table_stride", "inner_stride"], do_not_specialize_on_alignment=["slots_ptr"])
def _up(
    block_ptr,
    down_ptr,
    up_ptr,
    inner_ptr,
    slots_ptr,
    table_ptr,
    table_stride,
    down_stride,
    inner_stride,
    H: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The bottleneck of one token on some features, added to its block."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    line = table_ptr + slot * table_stride
    vectors = tl.load(line).to(tl.int64) * PAGE
    if tl.load(down_ptr + (vectors + _CODES) * down_stride + 1).to(tl.int32) == 0:
        return
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < H
    i = tl.arange(0, PAGE)
    total = tl.zeros((BLOCK,), tl.float32)
    for index in tl.range(0, tl.load(line + 1)):
        rows = tl.load(line + 2 + index).to(tl.int64) * PAGE + i
        w = tl.load(up_ptr + rows[:, None] * H + n[None, :], mask=mask[None, :], other=0.0).to(tl.float32)
        h = tl.load(inner_ptr + token * inner_stride + index * PAGE + i)
        total += tl.sum(w * h[:, None], 0)
    at = up_ptr + vectors * H + n
    total += tl.load(at + _BIAS * H, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(at + (_BIAS + 1) * H, mask=mask, other=0.0).to(tl.float32)
    scaling = tl.load(at + _SCALING * H, mask=mask, other=0.0).to(tl.float32)
    scaling += tl.load(at + (_SCALING + 1) * H, mask=mask, other=0.0).to(tl.float32)
    block = tl.load(block_ptr + token * H + n, mask=mask, other=0.0)
    tl.store(block_ptr + token * H + n, (block.to(tl.float32) + total * scaling).to(block.dtype), mask=mask)
