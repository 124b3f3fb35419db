"""The second half of LoRA inside the kernels that finish a linear: what B adds to some columns of some tokens.

Rank rows are added one after another by fused multiply-adds in float32, so that a token's result follows from its own
adapter alone, whatever the shapes of tile and block. B's rows of at most STATIC pages are loaded before the kernel
that makes h has ended.
"""

from __future__ import annotations

import triton
import triton.language as tl

STATIC_PAGES = 2
"""Up to so many pages (rank 16) a kernel holds B in registers."""


@triton.jit
def page_rows(b_ptr, slot_pages_ptr, index, pages, n, mask, N: tl.constexpr, RANK_PAGE: tl.constexpr) -> tuple:
    """Columns n [1, BLOCK] of the rank rows of one page of a slot: RANK_PAGE tensors, zeros beyond the slot's pages."""
    own = index < pages
    # Not masked, so as not to wait for `pages`: unused entries are 0.
    page = tl.load(slot_pages_ptr + index).to(tl.int64)
    rows = ()
    for r in tl.static_range(RANK_PAGE):
        row = tl.load(b_ptr + (page * RANK_PAGE + r) * N + n, mask=mask & own, other=0.0)
        rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005  # the language has no unpacking
    return rows


@triton.jit
def page_h(
    h_ptr, live, scaling, h_part, RANK_PAGE: tl.constexpr, TARGETS: tl.constexpr, SEGMENTS: tl.constexpr
) -> tuple:
    """The scaled h [T, 1] of each rank row of a page. h_ptr [T]: to the page's first row of the target; live [T];
    h_part: from a segment of h to the next.
    """
    values = ()
    for r in tl.static_range(RANK_PAGE):
        h = tl.load(h_ptr + r * TARGETS, mask=live, other=0.0)
        for segment in tl.static_range(1, SEGMENTS):
            h += tl.load(h_ptr + segment * h_part + r * TARGETS, mask=live, other=0.0)
        values = values + ((h * scaling)[:, None],)  # type: ignore[assignment]  # noqa: RUF005
    return values


@triton.jit
def add_page(delta, rows, h, RANK_PAGE: tl.constexpr) -> tl.tensor:
    """delta [T, BLOCK] plus one page's rows, each times its h."""
    for r in tl.static_range(RANK_PAGE):
        delta = tl.fma(h[r], rows[r].to(tl.float32), delta)
    return delta


@triton.jit
def add_page_to_both(
    d0, d1, rows0, rows1, h_ptr, live, scaling0, scaling1, h_part, SECOND: tl.constexpr, RANK_PAGE: tl.constexpr,
    TARGETS: tl.constexpr, SEGMENTS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """`add_page` of two blocks of columns, of h_ptr's target and of the SECOND one from it. All of h is asked for
    before any is used.
    """
    h0 = page_h(h_ptr, live, scaling0, h_part, RANK_PAGE, TARGETS, SEGMENTS)
    h1 = h0
    if SECOND > 0:
        h1 = page_h(h_ptr + SECOND, live, scaling1, h_part, RANK_PAGE, TARGETS, SEGMENTS)
    return add_page(d0, rows0, h0, RANK_PAGE), add_page(d1, rows1, h1, RANK_PAGE)
