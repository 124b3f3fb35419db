"""Attention over paged keys and values on the GPU: one kernel for decode rows (split over the context) and for prefill
chunks.

Online softmax over blocks of keys (FlashAttention, Dao et al. 2022), the context of a decode row cut in chunks that
other programs sum (Flash-Decoding, Dao et al. 2023). A program holds the queries of one key-value head for a tile of
consecutive tokens of one row: QUERIES tokens times the heads that share the key-value head. Blocks and chunks begin at
multiples of their length counted from the row's first position, and a block that a query does not see adds exact zeros,
so a row's result depends neither on other rows nor on how its prompt was cut into prefill chunks.

Keys and values are [pages, page_size, kv_heads, head_dim]; whatever lies beyond a tile's last position is never read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.gpu.launch import cdiv, next_power_of_2

_CHUNK = 256
_PREFILL_QUERIES = 128
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
    common = (q, keys, values, token_start, context_lens, page_table, slopes)
    decode_contexts = [context for count, context in zip(row_tokens, row_contexts, strict=True) if count == 1]
    if decode_contexts:
        _decode(*common, out, len(row_tokens), max(decode_contexts), scale, window or 0, softcap)
    chunks = [count for count in row_tokens if count > 1]
    if chunks:
        _prefill(*common, out, chunks, scale, window or 0, softcap)
    return out


def _constants(q: torch.Tensor, keys: torch.Tensor, queries: int, block: int) -> dict[str, int]:
    heads, dim = q.shape[1:]
    kv_heads = keys.shape[2]
    shared = next_power_of_2(heads // kv_heads)
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "BLOCK_D": max(16, next_power_of_2(dim)),
        "SHARED": shared,
        "QUERIES": queries,
        "BLOCK_Q": max(16, queries * shared),
        "BLOCK_KEYS": block,
        "PAGE": keys.shape[1],
    }


def _factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """Of the scores before and (0: no soft cap) after the tanh; the result is for exp2."""
    return (scale * _LOG2_E, 0.0) if softcap is None else (scale / softcap, softcap * _LOG2_E)


def _decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    token_start: torch.Tensor,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    slopes: torch.Tensor | None,
    out: torch.Tensor,
    rows: int,
    longest: int,
    scale: float,
    window: int,
    softcap: float | None,
) -> None:
    """Every row that has one token."""
    constants = _constants(q, keys, 1, 64)
    heads, dim = q.shape[1:]
    splits = cdiv(longest, _CHUNK)
    if window:
        splits = min(splits, cdiv(window, _CHUNK) + 1)
    partial = torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=q.device)
    weight = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=q.device)
    _attend[(rows, keys.shape[2], splits)](
        q, keys, values, token_start, context_lens, page_table, slopes, partial, weight,
        q.stride(0), q.stride(1), page_table.stride(0), rows, splits, *_factors(scale, softcap), window,
        CHUNK=_CHUNK, DECODE=True, ROWS=1, CAPPED=softcap is not None, **constants, num_warps=4, num_stages=3,
    )  # fmt: skip
    _combine[(rows, heads)](
        partial, weight, token_start, context_lens, out, splits, window,
        HEADS=heads, DIM=dim, BLOCK_D=constants["BLOCK_D"], CHUNK=_CHUNK, BLOCK_C=8, num_warps=1,
    )  # fmt: skip


def _prefill(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    token_start: torch.Tensor,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    slopes: torch.Tensor | None,
    out: torch.Tensor,
    chunks: list[int],
    scale: float,
    window: int,
    softcap: float | None,
) -> None:
    """Every row that has more than one token."""
    rows = context_lens.shape[0]
    shared = next_power_of_2(q.shape[1] // keys.shape[2])
    queries = max(1, (_PREFILL_QUERIES if q.dtype != torch.float32 else 32) // shared)
    constants = _constants(q, keys, queries, 64 if q.dtype != torch.float32 else 32)
    tiles = sum(cdiv(count, queries) for count in chunks)
    _attend[(tiles, keys.shape[2], 1)](
        q, keys, values, token_start, context_lens, page_table, slopes, out, out,
        q.stride(0), q.stride(1), page_table.stride(0), rows, 1, *_factors(scale, softcap), window,
        CHUNK=0, DECODE=False, ROWS=max(64, next_power_of_2(rows)), CAPPED=softcap is not None, **constants,
        num_warps=8, num_stages=2,
    )  # fmt: skip


# What changes from step to step must not ask for another compilation.
@triton.jit(
    do_not_specialize=["rows", "splits", "table_stride", "window"],
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
    weight_ptr,
    q_token_stride,
    q_head_stride,
    table_stride,
    rows,
    splits,
    scale,
    cap,
    window,
    CHUNK: tl.constexpr,
    DECODE: tl.constexpr,
    ROWS: tl.constexpr,
    CAPPED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SHARED: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One tile of tokens, one key-value head; DECODE: one chunk of the context, left as unnormalized sums [rows, HEADS,
    splits, DIM].
    """
    if DECODE:
        row = tl.program_id(0)
        skipped = 0
    else:
        # Which row this tile belongs to: rows of one token have no tile here.
        r = tl.arange(0, ROWS)
        begin = tl.load(start_ptr + r, mask=r < rows, other=0)
        counts = tl.load(start_ptr + r + 1, mask=r < rows, other=0) - begin
        ends = tl.cumsum(tl.where(counts > 1, (counts + QUERIES - 1) // QUERIES, 0), 0)
        row = tl.sum((ends <= tl.program_id(0)).to(tl.int32), 0)
        before = tl.max(tl.where(ends <= tl.program_id(0), ends, 0), 0)
        skipped = (tl.program_id(0) - before) * QUERIES
    first_token = tl.load(start_ptr + row)
    count = tl.load(start_ptr + row + 1) - first_token
    context = tl.load(context_ptr + row)
    if DECODE:
        if count != 1:
            return
    kv_head = tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    i = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    token = skipped + i // SHARED
    head = kv_head * GROUP + i % SHARED
    live = (i // SHARED < QUERIES) & (token < count) & (i % SHARED < GROUP)
    position = context - count + token
    q = tl.load(
        q_ptr
        + (first_token + token).to(tl.int64)[:, None] * q_token_stride
        + head[:, None] * q_head_stride
        + d[None, :],
        mask=live[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + head, mask=live, other=0.0) * 1.4426950408889634
    # Keys that any query of the tile sees: [low, high).
    high = context - count + tl.minimum(skipped + QUERIES, count)
    low = tl.maximum(context - count + skipped - window + 1, 0) if window > 0 else 0
    if DECODE:
        begin_key = (low // CHUNK + tl.program_id(2)) * CHUNK
        high = tl.minimum(high, begin_key + CHUNK)
        if begin_key >= high:
            return
        begin_key = tl.maximum(begin_key, low // BLOCK_KEYS * BLOCK_KEYS)
    else:
        begin_key = low // BLOCK_KEYS * BLOCK_KEYS
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for first in tl.range(begin_key, high, BLOCK_KEYS):
        key = first + tl.arange(0, BLOCK_KEYS)
        inside = key < high
        page = tl.load(table_ptr + row * table_stride + key // PAGE, mask=inside, other=0).to(tl.int64)
        at = ((page * PAGE + key % PAGE) * KV_HEADS + kv_head) * DIM
        k = tl.load(keys_ptr + at[None, :] + d[:, None], mask=inside[None, :] & (d < DIM)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if CAPPED:
            scores = cap * (1.0 - 2.0 / (tl.exp2(scores * 2.8853900817779268) + 1.0))
        if slopes_ptr is not None:
            scores += slopes[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
        seen = inside[None, :] & (key[None, :] <= position[:, None])
        if window > 0:
            seen = seen & (position[:, None] - key[None, :] < window)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A query that has seen nothing yet keeps -inf: exp2(-inf - 0) is 0, where -inf - -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade = tl.exp2(top - base)
        p = tl.exp2(scores - base[:, None])
        total = total * fade + tl.sum(p, 1)
        v = tl.load(values_ptr + at[:, None] + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = new_top
    keep = live[:, None] & (d < DIM)[None, :]
    if DECODE:
        slot = (row * HEADS + head) * splits + tl.program_id(2)
        tl.store(out_ptr + slot.to(tl.int64)[:, None] * DIM + d[None, :], acc, mask=keep)
        tl.store(weight_ptr + slot * 2, top, mask=live)
        tl.store(weight_ptr + slot * 2 + 1, total, mask=live)
    else:
        at_out = ((first_token + token).to(tl.int64)[:, None] * HEADS + head[:, None]) * DIM + d[None, :]
        tl.store(out_ptr + at_out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["splits", "window"], do_not_specialize_on_alignment=["start_ptr", "context_ptr"])
def _combine(
    partial_ptr,
    weight_ptr,
    start_ptr,
    context_ptr,
    out_ptr,
    splits,
    window,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add a decode row's chunks, BLOCK_C at a time: an order that the row's own context fixes."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(start_ptr + row)
    if tl.load(start_ptr + row + 1) - token != 1:
        return
    context = tl.load(context_ptr + row)
    low = tl.maximum(context - window, 0) if window > 0 else 0
    chunks = tl.cdiv(context, CHUNK) - low // CHUNK
    d = tl.arange(0, BLOCK_D)
    first = (row * HEADS + head) * splits
    top = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    for begin in tl.range(0, chunks, BLOCK_C):
        i = begin + tl.arange(0, BLOCK_C)
        top = tl.maximum(top, tl.load(weight_ptr + (first + i) * 2, mask=i < chunks, other=float("-inf")))
    highest = tl.max(top, 0)
    total = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for begin in tl.range(0, chunks, BLOCK_C):
        i = begin + tl.arange(0, BLOCK_C)
        at = first + i
        share = tl.exp2(tl.load(weight_ptr + at * 2, mask=i < chunks, other=float("-inf")) - highest)
        total += tl.sum(share * tl.load(weight_ptr + at * 2 + 1, mask=i < chunks, other=0.0), 0)
        values = tl.load(
            partial_ptr + at.to(tl.int64)[:, None] * DIM + d[None, :],
            mask=(i < chunks)[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        acc += tl.sum(share[:, None] * values, 0)
    out = (token * HEADS + head).to(tl.int64) * DIM + d
    tl.store(out_ptr + out, (acc / total).to(out_ptr.dtype.element_ty), mask=d < DIM)
