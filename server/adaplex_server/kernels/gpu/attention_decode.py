"""Attention of rows that have one token, the context of each cut in chunks that other programs sum (Flash-Decoding, Dao
et al. 2023). A program holds the queries of the heads that share one key-value head; a second kernel joins the chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.gpu.attention_blocks import (
    SHORT_CHUNK,
    add_block,
    chunk_begin,
    chunk_index,
    chunk_of,
    join,
    locate,
)
from adaplex_server.kernels.gpu.launch import cdiv, dependent, next_power_of_2


def attend_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    token_start: torch.Tensor,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    slopes: torch.Tensor | None,
    out: torch.Tensor,
    longest: int,
    scales: tuple[float, float],
    window: int,
) -> None:
    """out[t] of every row that has one token; the other rows are passed over. longest: of the contexts; scales: of the
    scores before and (0: no soft cap) after the tanh, for exp2; window: 0 for none.
    """
    (heads, dim), (page, kv_heads), rows = q.shape[1:], keys.shape[1:3], context_lens.shape[0]
    splits = chunk_index(longest - 1) + 1
    if window:
        splits = min(splits, cdiv(window, SHORT_CHUNK) + 1)
    sums = torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=q.device)
    weights = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=q.device)
    block_d = max(16, next_power_of_2(dim))
    _attend[(kv_heads, rows, splits)](
        q, keys, values, token_start, context_lens, page_table, slopes, sums, weights,
        q.stride(0), q.stride(1), page_table.stride(0), splits, *scales, window,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, BLOCK_D=block_d, BLOCK_Q=max(16, next_power_of_2(heads // kv_heads)),
        BLOCK_KEYS=64 if q.dtype != torch.float32 else 32, PAGE=page, CAPPED=scales[1] != 0, ALIBI=slopes is not None,
        num_warps=4, num_stages=2, **dependent(),
    )  # fmt: skip
    _combine[(heads, rows)](
        sums, weights, token_start, context_lens, out, splits, window,
        HEADS=heads, DIM=dim, BLOCK_D=block_d, AT_ONCE=16, num_warps=1, **dependent(),
    )  # fmt: skip


# What changes from step to step must not ask for another compilation.
@triton.jit(
    do_not_specialize=["splits", "table_stride", "window"],
    do_not_specialize_on_alignment=["start_ptr", "context_ptr", "table_ptr"],
)
def _attend(
    q_ptr,
    keys_ptr,
    values_ptr,
    start_ptr,
    context_ptr,
    table_ptr,
    slopes_ptr,
    sums_ptr,
    weights_ptr,
    q_token_stride,
    q_head_stride,
    table_stride,
    splits,
    scale,
    cap,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    ALIBI: tl.constexpr,
    PDL: tl.constexpr,
):
    """One chunk of one row, one key-value head: unnormalized sums [rows, HEADS, splits, DIM], and the largest score and
    the sum of the weights.
    """
    kv_head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(context_ptr + row)
    token = tl.load(start_ptr + row)
    count = tl.load(start_ptr + row + 1) - token
    if PDL:
        tl.extra.cuda.gdc_wait()
    low = tl.maximum(context - window, 0) if window > 0 else 0
    chunk = chunk_of(low) + split
    begin = chunk_begin(chunk)
    high = tl.minimum(context, chunk_begin(chunk + 1))
    if (begin >= high) | (count != 1):
        return
    begin = tl.maximum(begin, low // BLOCK_KEYS * BLOCK_KEYS)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    i = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_KEYS)
    head = kv_head * GROUP + i
    live = i < GROUP
    d_mask = (d < DIM)[None, :]
    mask = live[:, None] & d_mask
    at_q = token.to(tl.int64) * q_token_stride + head[:, None] * q_head_stride + d[None, :]
    q = tl.load(q_ptr + at_q, mask=mask, other=0.0)
    slopes = tl.zeros((BLOCK_Q,), tl.float32)
    if ALIBI:
        slopes = tl.load(slopes_ptr + head, mask=live, other=0.0) * 1.4426950408889634
    ones = tl.full((BLOCK_KEYS, 16), 1.0, q.dtype)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q, 16), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    own = kv_head * DIM + d[None, :]
    for first in tl.range(begin, high, BLOCK_KEYS):
        at = locate(table_ptr + row * table_stride, first, high, n, KV_HEADS * DIM, PAGE, BLOCK_KEYS)[:, None] + own
        key = (first + n)[None, :]
        # Unwritten keys may be anything, their scores are not taken; unwritten values would spoil the sums.
        k = tl.load(keys_ptr + at, mask=d_mask, other=0.0)
        v = tl.load(values_ptr + at, mask=(first + n < high)[:, None] & d_mask, other=0.0)
        top, total, acc = add_block(
            q, k, v, ones, key, context - 1, slopes[:, None], top, total, acc, scale, cap, window, CAPPED, ALIBI
        )
    slot = (row * HEADS + head).to(tl.int64) * splits + split
    tl.store(sums_ptr + slot[:, None] * DIM + d[None, :], acc, mask=mask)
    tl.store(weights_ptr + slot * 2, top, mask=live)
    tl.store(weights_ptr + slot * 2 + 1, tl.max(total, 1), mask=live)


@triton.jit(do_not_specialize=["splits", "window"], do_not_specialize_on_alignment=["start_ptr", "context_ptr"])
def _combine(
    sums_ptr,
    weights_ptr,
    start_ptr,
    context_ptr,
    out_ptr,
    splits,
    window,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Join the chunks of one row and head in order, AT_ONCE on their way from memory."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    token = tl.load(start_ptr + row)
    count = tl.load(start_ptr + row + 1) - token
    context = tl.load(context_ptr + row)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if count != 1:
        return
    low = tl.maximum(context - window, 0) if window > 0 else 0
    chunks = chunk_of(context - 1) + 1 - chunk_of(low)
    d = tl.arange(0, BLOCK_D)
    one = tl.zeros((1,), tl.int32)
    d_mask = (d < DIM)[None, :]
    slot = (row * HEADS + head).to(tl.int64) * splits
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, BLOCK_D), tl.float32)
    for first in tl.range(0, chunks, AT_ONCE):
        for ahead in tl.static_range(AT_ONCE):
            at = slot + first + ahead + one
            there = first + ahead + one < chunks
            next_top = tl.load(weights_ptr + at * 2, mask=there, other=float("-inf"))
            next_total = tl.load(weights_ptr + at * 2 + 1, mask=there, other=0.0)
            sums = tl.load(sums_ptr + at[:, None] * DIM + d[None, :], mask=there[:, None] & d_mask, other=0.0)
            top, total, acc = join(top, total, acc, next_top, next_total, sums)
    at_out = (token * HEADS + head).to(tl.int64) * DIM + d[None, :]
    tl.store(out_ptr + at_out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=d_mask)
