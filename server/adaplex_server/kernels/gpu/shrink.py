"""The first half of LoRA for few tokens on the GPU: h = A x, each token with its own adapter's A.

A program holds one page (8 rank rows) of one adapter, a segment of K wide, in registers and goes through the tokens of
its tile, so that an adapter is read once a tile, all of its bytes in flight at once. The loads do not depend on x and
begin before the kernel that makes x has ended.

The order of a token's sums follows from K alone: within a segment as the registers lie, then segment by segment in
whoever reads h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adaplex_server.kernels.gpu.launch import cdiv, dependent, next_power_of_2

_SEGMENT = 2048
_WARP = 256


def segments(k: int) -> int:
    """Into how many parts the sum over K in-features is cut."""
    return cdiv(k, _SEGMENT)


def shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    slot_pages: torch.Tensor,
    slot_page_count: torch.Tensor,
    order: torch.Tensor,
    tiles: torch.Tensor,
    tile_tokens: int,
    max_pages: int,
    rank_page: int,
) -> torch.Tensor:
    """x [T, K] to h [segments(K), T, max_pages * rank_page * G] float32: row i * G + g for rank row i of target g, not
    scaled; rows beyond an adapter's own, and tokens without one, are left unwritten.

    a: [pool rows, G, K] of one layer; the rest as in `kernels.lora_tiles.LoraTiles` and `model.adapter_pool`.
    """
    tokens, (targets, k) = x.shape[0], a.shape[1:]
    parts, rows = segments(k), max_pages * rank_page * targets
    # As even as registers allow: a warp holds steps of 256.
    h = torch.empty(parts, tokens, rows, dtype=torch.float32, device=x.device)
    segment = cdiv(cdiv(k, parts), _WARP) * _WARP
    block = next_power_of_2(segment)
    if rows:
        _shrink[(tiles.shape[0], max_pages * targets, parts)](
            x, a, slot_pages, slot_page_count, order, tiles, h, tokens, rows, slot_pages.stride(0), x.stride(0),
            K=k, TARGETS=targets, RANK_PAGE=rank_page, SEGMENT=segment, BLOCK=block, TOKENS=tile_tokens,
            num_warps=max(1, block // _WARP), **dependent(),
        )  # fmt: skip
    return h


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
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    """RANK_PAGE consecutive rows of one page over one segment of K, for the tokens of one tile."""
    begin = tl.load(tiles_ptr + tl.program_id(0) * 3)
    count = tl.load(tiles_ptr + tl.program_id(0) * 3 + 1)
    slot = tl.load(tiles_ptr + tl.program_id(0) * 3 + 2)
    index = tl.program_id(1) // TARGETS
    pages = tl.load(page_count_ptr + tl.maximum(slot, 0))
    if (count == 0) | (slot < 0) | (index >= pages):
        if PDL:
            gdc_wait()
        return
    i = tl.arange(0, RANK_PAGE)
    local = tl.arange(0, BLOCK)
    k = tl.program_id(2) * SEGMENT + local
    inside = (local < SEGMENT) & (k < K)
    page = tl.load(pages_ptr + slot * pages_stride + index).to(tl.int64)
    row = page * (RANK_PAGE * TARGETS) + (tl.program_id(1) % TARGETS) * RANK_PAGE + i
    a = tl.load(a_ptr + row[:, None] * K + k[None, :], mask=inside[None, :], other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for t in tl.range(0, 1 if TOKENS == 1 else count):
        token = tl.load(order_ptr + begin + t)
        x = tl.load(x_ptr + token.to(tl.int64) * x_stride + k, mask=inside, other=0.0)
        h = tl.sum(a.to(tl.float32) * x.to(tl.float32)[None, :], 1)
        out = h_ptr + (tl.program_id(2) * tokens + token).to(tl.int64) * rows + tl.program_id(1) * RANK_PAGE
        tl.store(out + i, h)
