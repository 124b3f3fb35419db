"""The first half of LoRA for few tokens on the GPU: h = A x, each token with its own adapter's A.

A program has one page (8 rank rows) of one adapter and the tokens of one tile, and goes through a segment of K with
everything in registers, so that an adapter is read once a tile, many bytes in flight at once. It runs beside the base's
product with the same x, launched after it.

The order of a token's sums follows from K alone: as the registers lie within a segment, then segment by segment in
whoever reads h. (Products of 16-bit numbers are exact in float32, so that it does not matter whether the compiler fuses
them with the sums; those of float32 it must not.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adaplex_server.kernels.gpu.launch import cdiv, dependent, next_power_of_2, unfused

_SEGMENT = 8192
_STEP = 1024
_WARP = 256
_LANES = tl.constexpr(8)
"""Neighbours in K that one thread holds."""


def segments(k: int) -> int:
    """Into how many parts the sum over K in-features is cut."""
    return cdiv(k, _SEGMENT)


def empty_h(x: torch.Tensor, max_pages: int, rank_page: int, targets: int) -> torch.Tensor:
    """Memory for the h of x [T, K]."""
    rows = max_pages * rank_page * targets
    return torch.empty(segments(x.shape[1]), x.shape[0], rows, dtype=torch.float32, device=x.device)


def shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    h: torch.Tensor,
    slot_pages: torch.Tensor,
    slot_page_count: torch.Tensor,
    order: torch.Tensor,
    tiles: torch.Tensor,
    tile_tokens: int,
    max_pages: int,
    rank_page: int,
    beside: bool,
) -> None:
    """x [T, K] to h [segments(K), T, max_pages * rank_page * G] float32: row i * G + g for rank row i of target g, not
    scaled; rows beyond an adapter's own, and tokens without one, are left unwritten.

    To be launched right after the product of x with the base's weights, and h made (`empty_h`) before it, whose scratch
    must not become h. beside: the product is one of this package's kernels, which let this one begin as soon as x is
    there; others are waited for.

    a: [pool rows, G, K] of one layer; the rest as in `kernels.lora_tiles.LoraTiles` and `model.adapter_pool`.
    """
    tokens, (targets, k) = x.shape[0], a.shape[1:]
    parts, _, rows = h.shape
    segment = cdiv(cdiv(k, parts), _WARP) * _WARP
    steps = cdiv(segment, _STEP)
    block = next_power_of_2(cdiv(segment, steps))
    if rows:
        _shrink[(tiles.shape[0], max_pages * targets, parts)](
            x, a, slot_pages, slot_page_count, order, tiles, h, tokens, rows, slot_pages.stride(0), x.stride(0),
            K=k, TARGETS=targets, RANK_PAGE=rank_page, SEGMENT=segment, STEPS=steps, BLOCK=block, TOKENS=tile_tokens,
            BESIDE=beside, num_warps=max(1, block // _WARP), **dependent(),
            **(unfused() if x.dtype == torch.float32 else {}),
        )  # fmt: skip


# What changes from step to step must not ask for another compilation.
@triton.jit(do_not_specialize=["tokens", "rows"], do_not_specialize_on_alignment=["order_ptr", "tiles_ptr"])
def _shrink(
    x_ptr,
    a_ptr,
    pages_ptr,
    page_count_ptr,
    order_ptr,
    tiles_ptr,
    h_ptr,
    tokens,
    rows,
    pages_stride,
    x_stride,
    K: tl.constexpr,
    TARGETS: tl.constexpr,
    RANK_PAGE: tl.constexpr,
    SEGMENT: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    BESIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """RANK_PAGE consecutive rows of one page over one segment of K, for the tokens of one tile.

    BESIDE: x is there from the beginning. That the product in front has ended is what one program waits for in the name
    of all, as the successor waits for all of this kernel.
    """
    waits = (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0)
    begin = tl.load(tiles_ptr + tl.program_id(0) * 3)
    count = tl.load(tiles_ptr + tl.program_id(0) * 3 + 1)
    slot = tl.load(tiles_ptr + tl.program_id(0) * 3 + 2)
    index = tl.program_id(1) // TARGETS
    pages = tl.load(page_count_ptr + tl.maximum(slot, 0))
    page = tl.load(pages_ptr + tl.maximum(slot, 0) * pages_stride + index).to(tl.int64)
    if (count == 0) | (slot < 0) | (index >= pages):
        if PDL:
            # The language knows no `or` of a constant and a value.
            if BESIDE:
                if waits:
                    gdc_wait()
            else:
                gdc_wait()
        return
    i = tl.arange(0, RANK_PAGE)
    t = tl.arange(0, TOKENS)
    lane = tl.arange(0, BLOCK)[None, None, :]
    begin_k = tl.program_id(2) * SEGMENT
    end_k = tl.minimum(begin_k + SEGMENT, K)
    row = page * (RANK_PAGE * TARGETS) + (tl.program_id(1) % TARGETS) * RANK_PAGE + i
    a_rows = a_ptr + row[None, :, None] * K
    live = t < count
    token = tl.load(order_ptr + begin + t, mask=live, other=0)
    x_rows = x_ptr + token.to(tl.int64)[:, None, None] * x_stride
    a = tl.load(a_rows + (begin_k + lane), mask=begin_k + lane < end_k, other=0.0)
    if PDL:
        # Not before A is asked for: the successor's programs ask for B.
        gdc_launch_dependents()
        if not BESIDE:
            gdc_wait()
    x = tl.load(x_rows + (begin_k + lane), mask=live[:, None, None] & (begin_k + lane < end_k), other=0.0)
    total = tl.zeros((TOKENS, RANK_PAGE, BLOCK // _LANES), tl.float32)
    for step in tl.static_range(STEPS):
        this_a = a
        this_x = x
        if step + 1 < STEPS:
            # On their way while this step is summed.
            k = begin_k + (step + 1) * BLOCK + lane
            a = tl.load(a_rows + k, mask=k < end_k, other=0.0)
            x = tl.load(x_rows + k, mask=live[:, None, None] & (k < end_k), other=0.0)
        product = this_a.to(tl.float32) * this_x.to(tl.float32)
        total += tl.sum(tl.reshape(product, (TOKENS, RANK_PAGE, BLOCK // _LANES, _LANES)), 3)
    out = h_ptr + (tl.program_id(2) * tokens + token).to(tl.int64) * rows + tl.program_id(1) * RANK_PAGE
    tl.store(out[:, None] + i[None, :], tl.sum(total, 2), mask=live[:, None])
    if PDL and BESIDE:
        if waits:
            gdc_wait()
