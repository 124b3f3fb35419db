"""Attention over paged keys and values on the GPU. Rows of one token go to `attention_decode`; tiles of consecutive
tokens of the others are computed here: a program holds the queries of one key-value head, QUERIES tokens times the
heads that share it, and walks through the context.

The order of a token's sums follows from its position alone (`attention_blocks`): it has the same bits in a chunk of any
size, as a decode row, and whoever shares the step.

Keys and values are [pages, page_size, kv_heads, head_dim]. Values beyond a tile's last position are not read; keys
there have no effect.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.gpu.attention_blocks import add_block, chunk_ends, join, locate
from adaplex_server.kernels.gpu.attention_decode import attend_decode
from adaplex_server.kernels.gpu.launch import cdiv, next_power_of_2

_LOG2_E = 1.4426950408889634


def attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    token_start: torch.Tensor,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    row_tokens: tuple[int, ...],
    row_contexts: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [T, H, D] (last dimension contiguous) to [T, H * D]. The rest as in `model.batch.StepBatch`; window: tokens
    seen, the query's own included; softcap, slopes: as in `kernels.attention`.
    """
    tokens, heads, dim = q.shape
    out = torch.empty(tokens, heads * dim, dtype=q.dtype, device=q.device)
    common = (q, keys, values, token_start, context_lens, page_table, slopes, out)
    # Before and after the tanh; the scores are for exp2.
    scales = (scale * _LOG2_E, 0.0) if softcap is None else (scale / softcap, softcap * _LOG2_E)
    decode_contexts = [context for count, context in zip(row_tokens, row_contexts, strict=True) if count == 1]
    if decode_contexts:
        attend_decode(*common, max(decode_contexts), scales, window or 0)
    chunks = [count for count in row_tokens if count > 1]
    if chunks:
        _attend_chunks(*common, chunks, scales, window or 0)
    return out


def _attend_chunks(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    token_start: torch.Tensor,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    slopes: torch.Tensor | None,
    out: torch.Tensor,
    chunks: list[int],
    scales: tuple[float, float],
    window: int,
) -> None:
    """Every row that has more than one token."""
    (heads, dim), (page, kv_heads), rows = q.shape[1:], keys.shape[1:3], context_lens.shape[0]
    shared, block_d = next_power_of_2(heads // kv_heads), max(16, next_power_of_2(dim))
    wide = q.dtype == torch.float32
    queries = max(1, (32 if wide else 64) // shared)
    block_q = max(16, queries * shared)
    _attend[(kv_heads, sum(cdiv(count, queries) for count in chunks))](
        q, keys, values, token_start, context_lens, page_table, slopes, out,
        q.stride(0), q.stride(1), page_table.stride(0), rows, *scales, window,
        ROWS=max(64, next_power_of_2(rows)), HEADS=heads, KV_HEADS=kv_heads, DIM=dim, BLOCK_D=block_d, SHARED=shared,
        QUERIES=queries, BLOCK_Q=block_q, BLOCK_KEYS=32 if wide else 64, PAGE=page,
        CAPPED=scales[1] != 0, ALIBI=slopes is not None,
        num_warps=4 if block_q * block_d <= 64 * 128 else 8, num_stages=2,
    )  # fmt: skip


# What changes from step to step must not ask for another compilation.
@triton.jit(
    do_not_specialize=["rows", "table_stride", "window"],
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
    out_ptr,
    q_token_stride,
    q_head_stride,
    table_stride,
    rows,
    scale,
    cap,
    window,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SHARED: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """One tile of tokens, one key-value head."""
    kv_head = tl.program_id(0)
    # The last tile of a prompt has most to do: it goes first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    # Which row this tile belongs to: rows of one token have no tile here.
    r = tl.arange(0, ROWS)
    starts = tl.load(start_ptr + r, mask=r < rows, other=0)
    counts = tl.load(start_ptr + r + 1, mask=r < rows, other=0) - starts
    ends = tl.cumsum(tl.where(counts > 1, (counts + QUERIES - 1) // QUERIES, 0), 0)
    row = tl.sum((ends <= tile).to(tl.int32), 0)
    skipped = (tile - tl.max(tl.where(ends <= tile, ends, 0), 0)) * QUERIES
    first_token = tl.load(start_ptr + row)
    count = tl.load(start_ptr + row + 1) - first_token
    before = tl.load(context_ptr + row) - count
    GROUP: tl.constexpr = HEADS // KV_HEADS
    i = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_KEYS)
    token = skipped + i // SHARED
    head = kv_head * GROUP + i % SHARED
    live = (i // SHARED < QUERIES) & (token < count) & (i % SHARED < GROUP)
    position = (before + token)[:, None]
    d_mask = (d < DIM)[None, :]
    mask = live[:, None] & d_mask
    at_q = (first_token + token).to(tl.int64)[:, None] * q_token_stride + head[:, None] * q_head_stride + d[None, :]
    q = tl.load(q_ptr + at_q, mask=mask, other=0.0)
    slopes = tl.zeros((BLOCK_Q,), tl.float32)
    if ALIBI:
        slopes = tl.load(slopes_ptr + head, mask=live, other=0.0) * 1.4426950408889634
    ones = tl.full((BLOCK_KEYS, 16), 1.0, q.dtype)
    # Of the chunk at hand, and of those before it.
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q, 16), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    all_top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    all_total = tl.zeros((BLOCK_Q,), tl.float32)
    all_acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    # Keys that any query of the tile sees: [low, high).
    high = before + tl.minimum(skipped + QUERIES, count)
    low = tl.maximum(before + skipped - window + 1, 0) if window > 0 else 0
    own = kv_head * DIM + d[None, :]
    for first in tl.range(low // BLOCK_KEYS * BLOCK_KEYS, high, BLOCK_KEYS):
        at = locate(table_ptr + row * table_stride, first, high, n, KV_HEADS * DIM, PAGE, BLOCK_KEYS)[:, None] + own
        key = (first + n)[None, :]
        k = tl.load(keys_ptr + at, mask=d_mask, other=0.0)
        v = tl.load(values_ptr + at, mask=(first + n < high)[:, None] & d_mask, other=0.0)
        top, total, acc = add_block(
            q, k, v, ones, key, position, slopes[:, None], top, total, acc, scale, cap, window, CAPPED, ALIBI
        )
        if chunk_ends(first + BLOCK_KEYS):
            all_top, all_total, all_acc = join(all_top, all_total, all_acc, top, tl.max(total, 1), acc)
            top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_Q, 16), tl.float32)
            acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    all_top, all_total, all_acc = join(all_top, all_total, all_acc, top, tl.max(total, 1), acc)
    at_out = ((first_token + token).to(tl.int64)[:, None] * HEADS + head[:, None]) * DIM + d[None, :]
    tl.store(out_ptr + at_out, (all_acc / all_total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
