"""LoRA deltas of a fused linear on the GPU, rows of different adapters and ranks in one launch: y += B (scaling * (A
x)).

Two kernels (shrink and expand, as in Punica, Chen et al. 2023), each over tiles of tokens that share an adapter slot
(`kernels.lora_tiles`). Which rank rows a tile reads comes from the page table on the device, so the same launch serves
any mix; a tile stops at its own adapter's rank.

The order of a token's sums follows from the linear's shape and its own adapter's rank: K in segments, each summed in
steps of the tensor core, the segments' sums added in order, then rank rows in blocks of 16. Who shares the tile or the
batch does not matter, bit for bit.

Layouts are those of `model.adapter_pool`: a [pages * RANK_PAGE, G, K] and b [pages * RANK_PAGE, N] of one layer,
scaling [S, G] float32, slot_pages [S, Q], slot_page_count [S]. Between the kernels: h [segments, ordered tokens, rows]
float32, row (i * G + g) for rank row i of target g.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.gpu.launch import cdiv

_SEGMENT = 1024
_WIDE = 512


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: torch.Tensor,
    slot_pages: torch.Tensor,
    slot_page_count: torch.Tensor,
    spans: tuple[tuple[int, int], ...],
    order: torch.Tensor,
    tiles: torch.Tensor,
    tile_tokens: int,
    max_pages: int,
    rank_page: int,
) -> None:
    """y [T, N] += the delta of each token's adapter on x [T, K], in place.

    spans: [begin, end) of each target in N, contiguous, at most four. order: [T'] int32, tokens grouped by slot. tiles:
    [tiles, 3] int32, (begin in order, tokens, slot); tokens 0 for an unused tile, slot negative for one without
    adapter. tile_tokens: the most of one tile (up to 16, or 64). max_pages: the most pages of any slot in tiles.
    rank_page: rank rows of a page.
    """
    count, (targets, k), n = tiles.shape[0], a.shape[1:], b.shape[1]
    if count == 0 or max_pages == 0:
        return
    segments = cdiv(k, _SEGMENT)
    rows = max_pages * rank_page * targets
    # Large tiles sum the segments themselves (same order): their partial sums would be as large as x.
    inside = tile_tokens > 16
    tile_tokens = max(tile_tokens, 16)
    h = torch.empty(1 if inside else segments, order.shape[0], rows, dtype=torch.float32, device=x.device)
    _shrink[(count, cdiv(rows, 16), 1 if inside else segments)](
        x, a, slot_pages, slot_page_count, order, tiles, h,
        order.shape[0], max_pages, slot_pages.stride(0), x.stride(0),
        K=k, TARGETS=targets, RANK_PAGE=rank_page, TOKENS=tile_tokens, SEGMENT=_SEGMENT, SEGMENTS=segments,
        INSIDE=inside, BLOCK_K=128, num_warps=4, num_stages=3,
    )  # fmt: skip
    block_n = 128 if inside else _WIDE
    ends = [span[1] for span in spans] + [n] * (4 - len(spans))
    blocks = sum(cdiv(end - begin, block_n) for begin, end in spans)
    _expand[(count, blocks)](
        y, h, b, scaling, slot_pages, slot_page_count, order, tiles,
        order.shape[0], max_pages, slot_pages.stride(0), y.stride(0), ends[0], ends[1], ends[2], ends[3],
        N=n, TARGETS=targets, RANK_PAGE=rank_page, TOKENS=tile_tokens, SEGMENTS=1 if inside else segments,
        BLOCK_N=block_n, num_warps=4, num_stages=2,
    )  # fmt: skip


# What changes from step to step must not ask for another compilation.
@triton.jit(do_not_specialize=["ordered", "max_pages"], do_not_specialize_on_alignment=["order_ptr", "tiles_ptr"])
def _shrink(
    x_ptr,
    a_ptr,
    pages_ptr,
    page_count_ptr,
    order_ptr,
    tiles_ptr,
    h_ptr,
    ordered,
    max_pages,
    pages_stride,
    x_stride,
    K: tl.constexpr,
    TARGETS: tl.constexpr,
    RANK_PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    INSIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """16 rank rows of one tile, one segment of K (INSIDE: all of them)."""
    tile = tl.program_id(0)
    begin = tl.load(tiles_ptr + tile * 3)
    count = tl.load(tiles_ptr + tile * 3 + 1)
    slot = tl.load(tiles_ptr + tile * 3 + 2)
    if (count == 0) | (slot < 0):
        return
    PER_PAGE: tl.constexpr = RANK_PAGE * TARGETS
    rows = max_pages * PER_PAGE
    own_rows = tl.load(page_count_ptr + slot) * PER_PAGE
    if tl.program_id(1) * 16 >= own_rows:
        return
    row = tl.program_id(1) * 16 + tl.arange(0, 16)
    row_mask = row < own_rows
    page = tl.load(pages_ptr + slot * pages_stride + row // PER_PAGE, mask=row_mask, other=0).to(tl.int64)
    a_row = a_ptr + (page * PER_PAGE + row % PER_PAGE) * K
    t = tl.arange(0, TOKENS)
    t_mask = t < count
    token = tl.load(order_ptr + begin + t, mask=t_mask, other=0).to(tl.int64)
    x_row = x_ptr + token * x_stride
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((16, TOKENS), tl.float32)
    first_segment = 0 if INSIDE else tl.program_id(2)
    last_segment = SEGMENTS if INSIDE else tl.program_id(2) + 1
    for segment in tl.range(first_segment, last_segment):
        acc = tl.zeros((16, TOKENS), tl.float32)
        for first in tl.range(segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, K), BLOCK_K):
            at = first + k
            a = tl.load(a_row[:, None] + at[None, :], mask=row_mask[:, None] & (at < K)[None, :], other=0.0)
            x = tl.load(x_row[None, :] + at[:, None], mask=t_mask[None, :] & (at < K)[:, None], other=0.0)
            acc = tl.dot(a, x, acc, input_precision="ieee")
        total += acc
    part = 0 if INSIDE else tl.program_id(2)
    out = h_ptr + (begin + t + part * ordered).to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(out, total, mask=row_mask[:, None] & t_mask[None, :])


@triton.jit(do_not_specialize=["ordered", "max_pages"], do_not_specialize_on_alignment=["order_ptr", "tiles_ptr"])
def _expand(
    y_ptr,
    h_ptr,
    b_ptr,
    scaling_ptr,
    pages_ptr,
    page_count_ptr,
    order_ptr,
    tiles_ptr,
    ordered,
    max_pages,
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
    SEGMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N outputs of one target for one tile."""
    tile = tl.program_id(0)
    begin = tl.load(tiles_ptr + tile * 3)
    count = tl.load(tiles_ptr + tile * 3 + 1)
    slot = tl.load(tiles_ptr + tile * 3 + 2)
    if (count == 0) | (slot < 0):
        return
    rank = tl.load(page_count_ptr + slot) * RANK_PAGE
    rows = max_pages * (RANK_PAGE * TARGETS)
    # Blocks are counted target by target, so that none straddles two.
    block = tl.program_id(1)
    target = 0
    low = 0
    high = end0
    if TARGETS > 1:
        blocks = tl.cdiv(end0, BLOCK_N)
        if block >= blocks:
            block -= blocks
            target = 1
            low = end0
            high = end1
            blocks = tl.cdiv(end1 - end0, BLOCK_N)
            if TARGETS > 2:
                if block >= blocks:
                    block -= blocks
                    target = 2
                    low = end1
                    high = end2
                    blocks = tl.cdiv(end2 - end1, BLOCK_N)
                    if TARGETS > 3:
                        if block >= blocks:
                            block -= blocks
                            target = 3
                            low = end2
                            high = end3
    n = low + block * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < high
    t = tl.arange(0, TOKENS)
    t_mask = t < count
    i = tl.arange(0, 16)
    acc = tl.zeros((TOKENS, BLOCK_N), tl.float32)
    scaling = tl.load(scaling_ptr + slot * TARGETS + target)
    for first in tl.range(0, rank, 16):
        at = first + i
        inside = at < rank
        h = tl.zeros((TOKENS, 16), tl.float32)
        for part in tl.static_range(SEGMENTS):
            source = (
                h_ptr + (begin + t + part * ordered).to(tl.int64)[:, None] * rows + (at * TARGETS + target)[None, :]
            )
            h += tl.load(source, mask=t_mask[:, None] & inside[None, :], other=0.0)
        page = tl.load(pages_ptr + slot * pages_stride + at // RANK_PAGE, mask=inside, other=0).to(tl.int64)
        b_row = b_ptr + (page * RANK_PAGE + at % RANK_PAGE) * N
        b = tl.load(b_row[:, None] + n[None, :], mask=inside[:, None] & n_mask[None, :], other=0.0)
        h = h * scaling
        if b.dtype == tl.float16:
            # float16 could not hold a large h; tf32 has its precision and float32's range.
            acc = tl.dot(h, b.to(tl.float32), acc, input_precision="tf32")
        else:
            acc = tl.dot(h.to(b.dtype), b, acc, input_precision="ieee")
    token = tl.load(order_ptr + begin + t, mask=t_mask, other=0).to(tl.int64)
    out = y_ptr + token[:, None] * y_stride + n[None, :]
    mask = t_mask[:, None] & n_mask[None, :]
    acc += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=mask)
