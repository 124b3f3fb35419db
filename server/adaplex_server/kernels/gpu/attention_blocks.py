"""What the attention of decode rows and of prefill chunks share, operation for operation, so that a token's result has
the same bits either way.

The positions of a row are cut in chunks whose borders are the same for every row and step (`chunk_of`). Within a chunk,
blocks of keys are summed in order with a running maximum (FlashAttention, Dao et al. 2022); the chunks' sums are joined
in order (`join`). What a query does not see adds exact zeros. The sums of the weights are taken by the tensor core, as
those of the values are: its order does not depend on how a tile lies in the registers. Products that are added are
fused explicitly, since a compiler may fuse either.
"""

from __future__ import annotations

import triton
import triton.language as tl

SHORT_CHUNK = 128
LONG_CHUNK = 256
LONG_FROM = 2048
"""Positions from here on are in long chunks. Short ones keep a short context's latency low, long ones a long context's
partial sums few.
"""

_NONE: tl.constexpr = tl.constexpr(float("-inf"))


def chunk_index(position: int) -> int:
    """`chunk_of`, on the host."""
    if position < LONG_FROM:
        return position // SHORT_CHUNK
    return LONG_FROM // SHORT_CHUNK + (position - LONG_FROM) // LONG_CHUNK


@triton.jit
def chunk_of(
    position, SHORT: tl.constexpr = SHORT_CHUNK, LONG: tl.constexpr = LONG_CHUNK, FROM: tl.constexpr = LONG_FROM
) -> tl.tensor:
    """The chunk that a position lies in."""
    return tl.where(position < FROM, position // SHORT, FROM // SHORT + (position - FROM) // LONG)


@triton.jit
def chunk_begin(
    chunk, SHORT: tl.constexpr = SHORT_CHUNK, LONG: tl.constexpr = LONG_CHUNK, FROM: tl.constexpr = LONG_FROM
) -> tl.tensor:
    """Its first position."""
    return tl.where(chunk < FROM // SHORT, chunk * SHORT, FROM + (chunk - FROM // SHORT) * LONG)


@triton.jit
def chunk_ends(
    position, SHORT: tl.constexpr = SHORT_CHUNK, LONG: tl.constexpr = LONG_CHUNK, FROM: tl.constexpr = LONG_FROM
) -> tl.tensor:
    """Whether a chunk ends before this position, a multiple of a block."""
    return ((position <= FROM) & (position % SHORT == 0)) | (position % LONG == 0)


@triton.jit
def locate(table_ptr, first, high, i, ROW: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Where keys first + i lie, of rows of ROW elements; i = 0 .. BLOCK - 1. From `high` on it may be anywhere in the
    cache.
    """
    if PAGE % BLOCK == 0:
        page = tl.load(table_ptr + first // PAGE).to(tl.int64)
        at = (page * PAGE + first % PAGE) * ROW + (i * ROW).to(tl.int64)
    else:
        key = first + i
        page = tl.load(table_ptr + key // PAGE, mask=key < high, other=0).to(tl.int64)
        at = (page * PAGE + key % PAGE) * ROW
    return at


@triton.jit
def add_block(
    q,
    k,
    v,
    ones,
    key,
    position,
    slopes,
    top,
    total,
    acc,
    scale,
    cap,
    window,
    CAPPED: tl.constexpr,
    ALIBI: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A block of keys joins a chunk. Scores are for exp2.

    q [Q, D], k and v [B, D], ones [B, 16]; key [1, B]; position [Q, 1] or a scalar; slopes [Q, 1], times log2 e. top
    [Q]: the chunk's largest score so far; total [Q, 16], each column the sum of the weights exp2(score - top); acc [Q,
    D], that of the values so weighted.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAPPED:
        # cap * tanh; exp2 of infinity is the cap itself.
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores * 2.8853900817779268) + 1.0))
    distance = position - key
    if ALIBI:
        far = tl.broadcast_to((0 - distance).to(tl.float32), scores.shape)
        scores = tl.fma(tl.broadcast_to(slopes, scores.shape), far, scores)
    seen = distance >= 0
    if window > 0:
        seen = seen & (distance < window)
    scores = tl.where(seen, scores, _NONE)
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A query that has seen nothing yet keeps -inf: exp2(-inf - 0) is 0, where -inf - -inf would be NaN.
    base = tl.where(new_top == _NONE, 0.0, new_top)
    fade = tl.exp2(top - base)
    weights = tl.exp2(scores - base[:, None]).to(v.dtype)
    total = tl.dot(weights, ones, total * fade[:, None], input_precision="ieee")
    acc = tl.dot(weights, v, acc * fade[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def join(top, total, acc, next_top, next_total, next_acc) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The sums over the chunks so far [Q], [Q], [Q, D], and those of the next."""
    new_top = tl.maximum(top, next_top)
    base = tl.where(new_top == _NONE, 0.0, new_top)
    fade = tl.exp2(top - base)
    share = tl.exp2(next_top - base)
    total = tl.fma(total, fade, next_total * share)
    acc = tl.fma(acc, tl.broadcast_to(fade[:, None], acc.shape), next_acc * share[:, None])
    return new_top, total, acc
