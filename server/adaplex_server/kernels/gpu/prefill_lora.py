"""LoRA of many tokens on the GPU, rows of different adapters and ranks in one launch. Two halves (as in Punica, Chen et
al. 2023): h = scaling * (A x), then y + B h, in place or with the MLP's activation in the same pass.

All go over tiles of tokens that share an adapter slot (`kernels.lora_tiles`) and multiply on the tensor core; which
rank rows a tile reads comes from the page table on the device.

The order of a token's sums follows from the linear's shape and its own adapter's rank: K in segments, each summed in
steps of the tensor core, the segments' sums added in order, then rank rows in blocks of 16. Who shares the tile or
the step does not matter, bit for bit.

Layouts are those of `model.adapter_pool`: a [pages * RANK_PAGE, G, K] and b [pages * RANK_PAGE, N] of one layer,
scaling [S, G] float32, slot_pages [S, Q], slot_page_count [S]. h [tokens in tiles, rows], row (i * G + g) for rank row
i of target g, in b's dtype, or float32 where that is float16, which could not hold a large h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.gpu.activation import KINDS, act
from adaplex_server.kernels.gpu.launch import cdiv
from adaplex_server.kernels.lora_tiles import LoraTiles

_SEGMENT = 1024
_BLOCK_N = 64
_BLOCKS = 4
"""Blocks of columns that one program goes through."""


@dataclass(frozen=True)
class SlotPages:
    """Where the slots' rank rows lie: pages [S, Q] int32, count [S] int32, page_rows rank rows a page."""

    pages: torch.Tensor
    count: torch.Tensor
    page_rows: int


@dataclass(frozen=True)
class Expansion:
    """What the adapters add to a linear's output: h as the module says; b [pool rows, N] of the layer; spans: [begin,
    end) of each target in N, contiguous, at most four.
    """

    h: torch.Tensor
    b: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    slots: SlotPages
    tiles: LoraTiles


def shrink(
    x: torch.Tensor, a: torch.Tensor, scaling: torch.Tensor, slots: SlotPages, tiles: LoraTiles, dtype: torch.dtype
) -> torch.Tensor:
    """h of x [T, K]. dtype: of b. Rows beyond a token's own adapter's are left unwritten."""
    (targets, k), count = a.shape[1:], tiles.tiles.shape[0]
    ordered, rows, segments = tiles.order.shape[0], tiles.max_pages * slots.page_rows * targets, cdiv(k, _SEGMENT)
    parts = torch.empty(segments, ordered, rows, dtype=torch.float32, device=x.device)
    h = torch.empty(ordered, rows, dtype=torch.float32 if dtype == torch.float16 else dtype, device=x.device)
    if not count or not rows:
        return h
    tokens, block = max(16, tiles.tile_tokens), 16 if rows <= 16 else 64
    where = (slots.pages, slots.count, tiles.order, tiles.tiles)
    sizes = {"TARGETS": targets, "RANK_PAGE": slots.page_rows, "TOKENS": tokens, "BLOCK_ROWS": block}
    _shrink[(count, cdiv(rows, block), segments)](
        x, a, *where, parts, ordered, rows, slots.pages.stride(0), x.stride(0),
        K=k, SEGMENT=_SEGMENT, BLOCK_K=128 if x.dtype != torch.float32 else 64, EVEN_K=k % 128 == 0, **sizes,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _scale[(count, cdiv(rows, block))](
        parts, scaling, slots.count, tiles.tiles, h, ordered, rows, SEGMENTS=segments, **sizes, num_warps=4
    )
    return h


def expand(y: torch.Tensor, found: Expansion) -> None:
    """y [T, N] += what the adapters add, in place, rounded once."""
    spans, n = found.spans, y.shape[1]
    if not found.h.shape[1]:
        return
    ends = [end for _, end in spans] + [n] * (4 - len(spans))
    blocks = sum(cdiv(end - begin, _BLOCKS * _BLOCK_N) for begin, end in spans)
    _expand[(found.tiles.tiles.shape[0], blocks)](
        y, *_arguments(found), y.stride(0), *ends, **_constants(found, n), num_warps=4, num_stages=2
    )


def expand_activation(y: torch.Tensor, found: Expansion, activation: str) -> torch.Tensor:
    """y [T, 2F], gate beside up, each with what its adapters add -> act(gate) * up [T, F], rounded once. Every
    token is in a tile.
    """
    tokens, n = y.shape
    out = torch.empty(tokens, n // 2, dtype=y.dtype, device=y.device)
    _expand_activation[(found.tiles.tiles.shape[0], cdiv(n // 2, _BLOCKS * _BLOCK_N))](
        y, out, *_arguments(found), y.stride(0), KIND=KINDS[activation], **_constants(found, n),
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def _arguments(found: Expansion) -> tuple[torch.Tensor | int, ...]:
    slots, tiles = found.slots, found.tiles
    return found.h, found.b, slots.pages, slots.count, tiles.order, tiles.tiles, found.h.shape[1], slots.pages.stride(0)


def _constants(found: Expansion, n: int) -> dict[str, int]:
    return {
        "N": n,
        "TARGETS": len(found.spans),
        "RANK_PAGE": found.slots.page_rows,
        "TOKENS": max(16, found.tiles.tile_tokens),
        "BLOCK_N": _BLOCK_N,
        "BLOCKS": _BLOCKS,
    }


# What changes from step to step must not ask for another compilation.
@triton.jit(do_not_specialize=["ordered", "rows"], do_not_specialize_on_alignment=["order_ptr", "tiles_ptr"])
def _shrink(
    x_ptr,
    a_ptr,
    pages_ptr,
    page_count_ptr,
    order_ptr,
    tiles_ptr,
    parts_ptr,
    ordered,
    rows,
    pages_stride,
    x_stride,
    K: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    TARGETS: tl.constexpr,
    RANK_PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Some rows of A over one segment of K for one tile: sums [segments, ordered, rows]."""
    begin = tl.load(tiles_ptr + tl.program_id(0) * 3)
    count = tl.load(tiles_ptr + tl.program_id(0) * 3 + 1)
    slot = tl.load(tiles_ptr + tl.program_id(0) * 3 + 2)
    if (count == 0) | (slot < 0):
        return
    PER_PAGE: tl.constexpr = RANK_PAGE * TARGETS
    own_rows = tl.load(page_count_ptr + slot) * PER_PAGE
    if tl.program_id(1) * BLOCK_ROWS >= own_rows:
        return
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < own_rows
    page = tl.load(pages_ptr + slot * pages_stride + row // PER_PAGE, mask=row_mask, other=0).to(tl.int64)
    a_row = a_ptr + ((page * PER_PAGE + row % PER_PAGE) * K)[None, :]
    t = tl.arange(0, TOKENS)
    t_mask = t < count
    token = tl.load(order_ptr + begin + t, mask=t_mask, other=0).to(tl.int64)
    x_row = x_ptr + (token * x_stride)[:, None]
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((TOKENS, BLOCK_ROWS), tl.float32)
    low = tl.program_id(2) * SEGMENT
    for first in tl.range(low, tl.minimum(low + SEGMENT, K), BLOCK_K):
        at = first + k
        if EVEN_K:
            x = tl.load(x_row + at[None, :], mask=t_mask[:, None], other=0.0)
            a = tl.load(a_row + at[:, None], mask=row_mask[None, :], other=0.0)
        else:
            x = tl.load(x_row + at[None, :], mask=t_mask[:, None] & (at < K)[None, :], other=0.0)
            a = tl.load(a_row + at[:, None], mask=row_mask[None, :] & (at < K)[:, None], other=0.0)
        acc = tl.dot(x, a, acc, input_precision="ieee")
    out = parts_ptr + (tl.program_id(2) * ordered + begin + t).to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out, acc, mask=t_mask[:, None] & row_mask[None, :])


@triton.jit(do_not_specialize=["ordered", "rows"], do_not_specialize_on_alignment=["tiles_ptr"])
def _scale(
    parts_ptr,
    scaling_ptr,
    page_count_ptr,
    tiles_ptr,
    h_ptr,
    ordered,
    rows,
    SEGMENTS: tl.constexpr,
    TARGETS: tl.constexpr,
    RANK_PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """h of one tile: the segments' sums added in order, scaled, rounded."""
    begin = tl.load(tiles_ptr + tl.program_id(0) * 3)
    count = tl.load(tiles_ptr + tl.program_id(0) * 3 + 1)
    slot = tl.load(tiles_ptr + tl.program_id(0) * 3 + 2)
    if (count == 0) | (slot < 0):
        return
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    t = tl.arange(0, TOKENS)[:, None]
    mask = (t < count) & (row < tl.load(page_count_ptr + slot) * (RANK_PAGE * TARGETS))
    at = (begin + t).to(tl.int64) * rows + row
    h = tl.load(parts_ptr + at, mask=mask, other=0.0)
    for segment in tl.static_range(1, SEGMENTS):
        h += tl.load(parts_ptr + (segment * ordered).to(tl.int64) * rows + at, mask=mask, other=0.0)
    h *= tl.load(scaling_ptr + slot * TARGETS + row % TARGETS)
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _delta(
    h_ptr, b_ptr, own_pages_ptr, pages, at_h, t_mask, target, n, n_mask,
    N: tl.constexpr, TARGETS: tl.constexpr, RANK_PAGE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What an adapter of `pages` pages adds to a tile at columns n of a target, [TOKENS, BLOCK_N] float32. at_h
    [TOKENS]: to the tokens' rows of h.
    """
    i = tl.arange(0, 16)
    delta = tl.zeros((TOKENS, BLOCK_N), tl.float32)
    for first in tl.range(0, pages * RANK_PAGE, 16):
        at = first + i
        inside = at < pages * RANK_PAGE
        h = tl.load(
            h_ptr + at_h[:, None] + (at * TARGETS + target)[None, :], mask=t_mask[:, None] & inside[None, :], other=0.0
        )
        page = tl.load(own_pages_ptr + at // RANK_PAGE, mask=inside, other=0).to(tl.int64)
        b_row = b_ptr + ((page * RANK_PAGE + at % RANK_PAGE) * N)[:, None]
        b = tl.load(b_row + n[None, :], mask=inside[:, None] & n_mask[None, :], other=0.0)
        if b.dtype == tl.float16:
            # tf32 has float16's precision and float32's range.
            delta = tl.dot(h, b.to(tl.float32), delta, input_precision="tf32")
        else:
            delta = tl.dot(h, b, delta, input_precision="ieee")
    return delta


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["order_ptr", "tiles_ptr"])
def _expand(
    y_ptr,
    h_ptr,
    b_ptr,
    pages_ptr,
    page_count_ptr,
    order_ptr,
    tiles_ptr,
    rows,
    pages_stride,
    y_stride,
    end0,
    end1,
    end2,
    end3,
    N: tl.constexpr,
    TARGETS: tl.constexpr,
    RANK_PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS * BLOCK_N outputs of one target for one tile."""
    begin = tl.load(tiles_ptr + tl.program_id(0) * 3)
    count = tl.load(tiles_ptr + tl.program_id(0) * 3 + 1)
    slot = tl.load(tiles_ptr + tl.program_id(0) * 3 + 2)
    if (count == 0) | (slot < 0):
        return
    # Programs are counted target by target, so that none straddles two.
    WIDE: tl.constexpr = BLOCK_N * BLOCKS
    block = tl.program_id(1)
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
    t = tl.arange(0, TOKENS)
    t_mask = t < count
    token = tl.load(order_ptr + begin + t, mask=t_mask, other=0).to(tl.int64)
    pages = tl.load(page_count_ptr + slot)
    at_h = (begin + t).to(tl.int64) * rows
    y_row = y_ptr + token[:, None] * y_stride
    low += block * WIDE
    for first in tl.range(low, tl.minimum(low + WIDE, high), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        mask = t_mask[:, None] & (n < high)[None, :]
        delta = _delta(
            h_ptr, b_ptr, pages_ptr + slot * pages_stride, pages, at_h, t_mask, target, n, n < high,
            N, TARGETS, RANK_PAGE, TOKENS, BLOCK_N,
        )  # fmt: skip
        y = tl.load(y_row + n[None, :], mask=mask, other=0.0).to(tl.float32) + delta
        tl.store(y_row + n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["order_ptr", "tiles_ptr"])
def _expand_activation(
    y_ptr,
    out_ptr,
    h_ptr,
    b_ptr,
    pages_ptr,
    page_count_ptr,
    order_ptr,
    tiles_ptr,
    rows,
    pages_stride,
    y_stride,
    KIND: tl.constexpr,
    N: tl.constexpr,
    TARGETS: tl.constexpr,
    RANK_PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS * BLOCK_N outputs of the activation for one tile."""
    begin = tl.load(tiles_ptr + tl.program_id(0) * 3)
    count = tl.load(tiles_ptr + tl.program_id(0) * 3 + 1)
    slot = tl.load(tiles_ptr + tl.program_id(0) * 3 + 2)
    if count == 0:
        return
    F: tl.constexpr = N // 2
    t = tl.arange(0, TOKENS)
    t_mask = t < count
    token = tl.load(order_ptr + begin + t, mask=t_mask, other=0).to(tl.int64)
    own = pages_ptr + tl.maximum(slot, 0) * pages_stride
    pages = tl.load(page_count_ptr + slot, mask=slot >= 0, other=0)
    at_h = (begin + t).to(tl.int64) * rows
    y_row = y_ptr + token[:, None] * y_stride
    out_row = out_ptr + token[:, None] * F
    low = tl.program_id(1) * (BLOCKS * BLOCK_N)
    for first in tl.range(low, tl.minimum(low + BLOCKS * BLOCK_N, F), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        n_mask = n < F
        mask = t_mask[:, None] & n_mask[None, :]
        to_gate = _delta(h_ptr, b_ptr, own, pages, at_h, t_mask, 0, n, n_mask, N, TARGETS, RANK_PAGE, TOKENS, BLOCK_N)
        to_up = _delta(
            h_ptr, b_ptr + F, own, pages, at_h, t_mask, TARGETS - 1, n, n_mask, N, TARGETS, RANK_PAGE, TOKENS, BLOCK_N
        )
        gate = tl.load(y_row + n[None, :], mask=mask, other=0.0).to(tl.float32) + to_gate
        up = tl.load(y_row + F + n[None, :], mask=mask, other=0.0).to(tl.float32) + to_up
        tl.store(out_row + n[None, :], (act(gate, KIND) * up).to(out_ptr.dtype.element_ty), mask=mask)
