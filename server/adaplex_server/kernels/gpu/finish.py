"""The end of a linear for few tokens on the GPU, in one launch: the product's parts summed in order, what each token's
adapter adds (B h), the bias, and then what the layer does with it: nothing, the MLP's activation, or rotary positions
and the write of keys and values.

A program has a tile of tokens that share an adapter (or have none) and two blocks of columns, x0 and x1, that belong
together: gate and up, or the two halves of heads that rotary positions turn. Every column is computed alone, its sums
in an order that the linear and the token's own adapter fix; only the norm over a head sums across columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adaplex_server.kernels.finish import Unfinished
from adaplex_server.kernels.gpu.activation import KINDS, act
from adaplex_server.kernels.gpu.expand import STATIC_PAGES, add_page_to_both, page_rows
from adaplex_server.kernels.gpu.launch import cdiv, dependent, next_power_of_2, unfused

_PLAIN = tl.constexpr(0)
_ACTIVATION = tl.constexpr(1)
_GATED = tl.constexpr(2)
_ROTARY = tl.constexpr(3)
# Pairs of columns a program; its warps, for one token and for a tile: four columns a thread, or two.
_BLOCK = 256
_WARPS, _WARPS_OF_TILES = 2, 4


def finish(y: Unfinished) -> torch.Tensor:
    """[T, N]."""
    out = torch.empty(y.shape, dtype=y.dtype, device=y.parts.device)
    _launch(y, out, _spans(y), MODE=_PLAIN)
    return out


def finish_activation(y: Unfinished, activation: str, gated: bool) -> torch.Tensor:
    """[T, N] to [T, N], or [T, N / 2] gated."""
    tokens, n = y.shape
    out = torch.empty(tokens, n // 2 if gated else n, dtype=y.dtype, device=y.parts.device)
    _launch(y, out, _spans(y), MODE=_GATED if gated else _ACTIVATION, KIND=KINDS[activation])
    return out


def fits_rotary(half: int, dim: int, normed: bool) -> bool:
    """Whether heads of `dim`, of which 2 * half dimensions turn, can be finished at once."""
    return 2 * half == dim and (not normed or (half == next_power_of_2(half) and half <= _BLOCK))


def finish_rotary(
    y: Unfinished,
    heads: int,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """q [T, heads, D]; keys and values are written, where kv_slots is not negative."""
    kv_heads, dim = keys.shape[2:]
    ends = heads * dim, (heads + kv_heads) * dim, (heads + 2 * kv_heads) * dim
    assert y.shape[1] == ends[-1], "outputs are not q, k and v heads"
    out = torch.empty(y.shape[0], heads, dim, dtype=y.dtype, device=y.parts.device)
    spans = ((0, ends[0]), (ends[0], ends[1]), (ends[1], ends[2]))
    normed = q_weight is not None and k_weight is not None
    tables = (positions, kv_slots, cos, sin, keys, values, *((q_weight, k_weight) if normed else (cos, cos)), eps)
    _launch(y, out, spans, tables, MODE=_ROTARY, HALF=dim // 2, NORM=normed, Q=heads * dim, KV=kv_heads * dim)
    return out


def _spans(y: Unfinished) -> tuple[tuple[int, int], ...]:
    return ((0, y.shape[1]),) if y.shrunk is None else y.shrunk.spans


def _launch(
    y: Unfinished,
    out: torch.Tensor,
    spans: tuple[tuple[int, int], ...],
    tables: tuple[Any, ...] | None = None,
    *,
    MODE: tl.constexpr,
    KIND: int = 0,
    HALF: int = 1,
    NORM: bool = False,
    Q: int = 1,
    KV: int = 1,
) -> None:
    splits, tokens, n = y.parts.shape
    if tokens == 0:
        return
    if MODE == _GATED:
        spans = ((0, n),)
    ends = [span[1] for span in spans] + [n] * (4 - len(spans))
    found, scale = y.shrunk, y.scale
    if found is None:
        rows, at_once = tokens, 1
        lora: tuple[Any, ...] = (out, out, out, out, out, out, out, 0, 0)
    else:
        rows = found.tiles.tiles.shape[0]
        at_once = found.tiles.tile_tokens
        lora = (
            found.h, found.b, found.scaling, found.slot_pages, found.slot_page_count, found.tiles.order,
            found.tiles.tiles, found.h.shape[2], found.slot_pages.stride(0),
        )  # fmt: skip
    _finish[(rows, sum(cdiv(end - begin, 2 * _BLOCK) for begin, end in spans))](
        y.parts, y.bias if y.bias is not None else out,
        scale.vectors if scale is not None else out, scale.index if scale is not None else out, out, *lora,
        *(tables or (*(out,) * 8, 0.0)), tokens, *ends,
        N=n, SPLITS=splits, BIAS=y.bias is not None, SCALED=scale is not None, LORA=found is not None,
        STATIC=found is not None and found.tiles.max_pages <= STATIC_PAGES,
        RANK_PAGE=found.page_rows if found is not None else 1, SEGMENTS=found.h.shape[0] if found is not None else 1,
        TARGETS=len(spans), LORA_TARGETS=len(found.spans) if found is not None else 1, TOKENS=at_once,
        MODE=MODE, KIND=KIND, HALF=HALF, NORM=NORM, Q=Q, KV=KV, BLOCK=_BLOCK,
        num_warps=_WARPS if at_once == 1 else _WARPS_OF_TILES, **dependent(), **unfused(),
    )  # fmt: skip


@triton.jit
def sum_parts(parts_ptr, at, mask, part, SPLITS: tl.constexpr) -> tl.tensor:
    """The parts at `at` added in order, float32. part: from one to the next."""
    total = tl.load(parts_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts_ptr + split * part + at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def scale_and_bias(
    x, token, live, n, n_mask, scale_ptr, scale_index_ptr, bias_ptr, N: tl.constexpr, SCALED: tl.constexpr,
    BIAS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """x [T, BLOCK] times each token's factors, if it has some, plus bias times the bias's; at columns n [1, BLOCK]."""
    if SCALED:
        index = tl.load(scale_index_ptr + token, mask=live, other=-1)
        where = scale_ptr + index.to(tl.int64)[:, None] * N + n
        own = n_mask & (index >= 0)[:, None]
        x *= tl.load(where, mask=own, other=1.0).to(tl.float32) + tl.load(where + N, mask=own, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
        if SCALED:
            factor = tl.load(where + 2 * N, mask=own, other=1.0).to(tl.float32)
            bias *= factor + tl.load(where + 3 * N, mask=own, other=0.0).to(tl.float32)
        x += bias
    return x


@triton.jit
def _span(block, end0, end1, end2, end3, TARGETS: tl.constexpr, WIDE: tl.constexpr):
    """Blocks are counted target by target, so that none straddles two: the target, its first and last column, and the
    block's number in it.
    """
    target, low, high = 0, 0, end0
    if TARGETS > 1:
        if block >= tl.cdiv(end0, WIDE):
            block -= tl.cdiv(end0, WIDE)
            target, low, high = 1, end0, end1
            if TARGETS > 2:
                if block >= tl.cdiv(end1 - end0, WIDE):
                    block -= tl.cdiv(end1 - end0, WIDE)
                    target, low, high = 2, end1, end2
                    if TARGETS > 3:
                        if block >= tl.cdiv(end2 - end1, WIDE):
                            block -= tl.cdiv(end2 - end1, WIDE)
                            target, low, high = 3, end2, end3
    return target, low, high, block


@triton.jit
def _pair_sum(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums of rows [ROWS, WIDTH] (a power of two), [ROWS, 1]: of neighbours, then of neighbouring sums, whatever the
    shapes of tile and block, where `tl.sum` goes by the registers.
    """
    if WIDTH == 1:
        total = tl.reshape(x, (ROWS, 1))
    else:
        left, right = tl.split(tl.reshape(x, (ROWS, WIDTH // 2, 2)))
        total = _pair_sum(left + right, ROWS, WIDTH // 2)
    return total


@triton.jit
def _head_norm(x0, x1, r, weight_ptr, eps, HALF: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Heads of halves x0 and x1 [TOKENS, BLOCK], normed. r [1, BLOCK]: each column's place in its half."""
    HEADS: tl.constexpr = TOKENS * (BLOCK // HALF)
    squares = _pair_sum(tl.fma(x0, x0, x1 * x1), HEADS, HALF) / (2 * HALF)
    inverse = tl.broadcast_to(tl.rsqrt(squares + eps), (HEADS, HALF))
    inverse = tl.reshape(inverse, (TOKENS, BLOCK))
    x0 = x0 * inverse * tl.load(weight_ptr + r).to(tl.float32)
    x1 = x1 * inverse * tl.load(weight_ptr + HALF + r).to(tl.float32)
    return x0, x1


@triton.jit
def _turn(x0, x1, r, token, live, mask, positions_ptr, cos_ptr, sin_ptr, HALF: tl.constexpr):
    """Halves of heads turned by each token's position."""
    at = tl.load(positions_ptr + token, mask=live, other=0)[:, None] * HALF + r
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + at, mask=mask, other=0.0)
    return tl.fma(x0, cos, -(x1 * sin)), tl.fma(x1, cos, x0 * sin)


@triton.jit
def _store_halves(out, x0, x1, mask, HALF: tl.constexpr):
    T: tl.constexpr = out.dtype.element_ty
    tl.store(out, x0.to(T), mask=mask)
    tl.store(out + HALF, x1.to(T), mask=mask)


@triton.jit
def _rotary(
    x0, x1, pair, token, live, mask, target, q_ptr, positions_ptr, kv_slots_ptr, cos_ptr, sin_ptr, keys_ptr,
    values_ptr, q_weight_ptr, k_weight_ptr, eps, HALF: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, Q: tl.constexpr, KV: tl.constexpr,
):  # fmt: skip
    """Halves x0 and x1 of heads of q (target 0), k or v, turned and to their places. pair [1, BLOCK]: columns counted
    in halves of the target's heads. Q, KV: features of all q heads, of all k heads.
    """
    r = pair % HALF
    feature = pair // HALF * (2 * HALF) + r
    place = tl.load(kv_slots_ptr + token, mask=live, other=-1)
    kept = mask & (place >= 0)[:, None]
    cache = place.to(tl.int64)[:, None] * KV + feature
    if target == 0:
        if NORM:
            x0, x1 = _head_norm(x0, x1, r, q_weight_ptr, eps, HALF, TOKENS, BLOCK)
        x0, x1 = _turn(x0, x1, r, token, live, mask, positions_ptr, cos_ptr, sin_ptr, HALF)
        _store_halves(q_ptr + token[:, None] * Q + feature, x0, x1, mask, HALF)
    elif target == 1:
        if NORM:
            x0, x1 = _head_norm(x0, x1, r, k_weight_ptr, eps, HALF, TOKENS, BLOCK)
        x0, x1 = _turn(x0, x1, r, token, live, mask, positions_ptr, cos_ptr, sin_ptr, HALF)
        _store_halves(keys_ptr + cache, x0, x1, kept, HALF)
    else:
        _store_halves(values_ptr + cache, x0, x1, kept, HALF)


# What changes from step to step must not ask for another compilation.
@triton.jit(
    do_not_specialize=["tokens", "h_rows"],
    do_not_specialize_on_alignment=["scale_index_ptr", "order_ptr", "tiles_ptr", "positions_ptr", "kv_slots_ptr"],
)
def _finish(
    parts_ptr,
    bias_ptr,
    scale_ptr,
    scale_index_ptr,
    y_ptr,
    h_ptr,
    b_ptr,
    scaling_ptr,
    pages_ptr,
    page_count_ptr,
    order_ptr,
    tiles_ptr,
    h_rows,
    pages_stride,
    positions_ptr,
    kv_slots_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    q_weight_ptr,
    k_weight_ptr,
    eps,
    tokens,
    end0,
    end1,
    end2,
    end3,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    LORA: tl.constexpr,
    STATIC: tl.constexpr,
    RANK_PAGE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TARGETS: tl.constexpr,
    LORA_TARGETS: tl.constexpr,
    TOKENS: tl.constexpr,
    MODE: tl.constexpr,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    Q: tl.constexpr,
    KV: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Two blocks of columns for one tile (without adapters: one token)."""
    i = tl.arange(0, BLOCK)[None, :]
    target, low, high, block = _span(tl.program_id(1), end0, end1, end2, end3, TARGETS, 2 * BLOCK)
    pair = block * BLOCK + i
    if MODE == _GATED:
        n0 = pair
        n1 = N // 2 + n0
        n0_mask = n0 < N // 2
        n1_mask = n0_mask
    elif MODE == _ROTARY:
        n0 = low + pair // HALF * (2 * HALF) + pair % HALF
        n1 = n0 + HALF
        n0_mask = n0 < high
        n1_mask = n0_mask
    else:
        n0 = low + block * (2 * BLOCK) + i
        n1 = n0 + BLOCK
        n0_mask = n0 < high
        n1_mask = n1 < high
    t = tl.arange(0, TOKENS)
    token = tl.program_id(0) + t
    live = token < tokens
    if LORA:
        begin = tl.load(tiles_ptr + tl.program_id(0) * 3)
        count = tl.load(tiles_ptr + tl.program_id(0) * 3 + 1)
        slot = tl.load(tiles_ptr + tl.program_id(0) * 3 + 2)
        if count == 0:
            if PDL:
                gdc_wait()
            return
        live = t < count
        token = tl.load(order_ptr + begin + t, mask=live, other=0)
        own_pages = pages_ptr + tl.maximum(slot, 0) * pages_stride
        pages = tl.load(page_count_ptr + slot, mask=slot >= 0, other=0)
        # A fused linear that adapters target as a whole has one target, whatever its columns are for.
        SECOND: tl.constexpr = LORA_TARGETS - 1 if MODE == _GATED else 0
        own = tl.minimum(target, LORA_TARGETS - 1)
        scaling0 = tl.load(scaling_ptr + slot * LORA_TARGETS + own, mask=slot >= 0, other=0.0)
        scaling1 = tl.load(scaling_ptr + slot * LORA_TARGETS + own + SECOND, mask=slot >= 0, other=0.0)
        if STATIC:
            b00 = page_rows(b_ptr, own_pages, 0, pages, n0, n0_mask, N, RANK_PAGE)
            b10 = page_rows(b_ptr, own_pages, 0, pages, n1, n1_mask, N, RANK_PAGE)
            b01 = page_rows(b_ptr, own_pages, 1, pages, n0, n0_mask, N, RANK_PAGE)
            b11 = page_rows(b_ptr, own_pages, 1, pages, n1, n1_mask, N, RANK_PAGE)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m0 = live[:, None] & n0_mask
    m1 = live[:, None] & n1_mask
    x0 = sum_parts(parts_ptr, token[:, None] * N + n0, m0, tokens * N, SPLITS)
    x1 = sum_parts(parts_ptr, token[:, None] * N + n1, m1, tokens * N, SPLITS)
    if LORA:
        if pages > 0:
            d0 = tl.zeros((TOKENS, BLOCK), tl.float32)
            d1 = tl.zeros((TOKENS, BLOCK), tl.float32)
            h = h_ptr + token.to(tl.int64) * h_rows + own
            part = tokens * h_rows
            PAGE: tl.constexpr = RANK_PAGE * LORA_TARGETS
            if STATIC:
                d0, d1 = add_page_to_both(
                    d0, d1, b00, b10, h, live, scaling0, scaling1, part, SECOND, RANK_PAGE, LORA_TARGETS, SEGMENTS
                )
                d0, d1 = add_page_to_both(
                    d0, d1, b01, b11, h + PAGE, live & (pages > 1), scaling0, scaling1, part, SECOND, RANK_PAGE,
                    LORA_TARGETS, SEGMENTS,
                )  # fmt: skip
            else:
                for index in tl.range(0, pages):
                    b0 = page_rows(b_ptr, own_pages, index, pages, n0, n0_mask, N, RANK_PAGE)
                    b1 = page_rows(b_ptr, own_pages, index, pages, n1, n1_mask, N, RANK_PAGE)
                    d0, d1 = add_page_to_both(
                        d0, d1, b0, b1, h + index * PAGE, live, scaling0, scaling1, part, SECOND, RANK_PAGE,
                        LORA_TARGETS, SEGMENTS,
                    )  # fmt: skip
            x0 += d0
            x1 += d1
    x0 = scale_and_bias(x0, token, live, n0, n0_mask, scale_ptr, scale_index_ptr, bias_ptr, N, SCALED, BIAS)
    x1 = scale_and_bias(x1, token, live, n1, n1_mask, scale_ptr, scale_index_ptr, bias_ptr, N, SCALED, BIAS)
    T: tl.constexpr = y_ptr.dtype.element_ty
    if MODE == _ROTARY:
        _rotary(
            x0, x1, pair, token, live, m0, target, y_ptr, positions_ptr, kv_slots_ptr, cos_ptr, sin_ptr, keys_ptr,
            values_ptr, q_weight_ptr, k_weight_ptr, eps, HALF, NORM, TOKENS, BLOCK, Q, KV,
        )  # fmt: skip
    elif MODE == _GATED:
        tl.store(y_ptr + token[:, None] * (N // 2) + n0, (act(x0, KIND) * x1).to(T), mask=m0)
    else:
        if MODE == _ACTIVATION:
            x0 = act(x0, KIND)
            x1 = act(x1, KIND)
        tl.store(y_ptr + token[:, None] * N + n0, x0.to(T), mask=m0)
        tl.store(y_ptr + token[:, None] * N + n1, x1.to(T), mask=m1)
