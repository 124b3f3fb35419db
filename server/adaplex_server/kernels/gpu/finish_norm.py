"""The end of a linear for few tokens on the GPU together with the residual addition and the norm that follow it, in one
launch: one program a token, which holds the whole row.

B's rows are read for each token; those that share an adapter find them in the cache. What the sums are and in which
order: `kernels.gpu.finish`. The residual sum is rounded to the activations' dtype before it is normed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adaplex_server.kernels.finish import Unfinished
from adaplex_server.kernels.gpu.expand import STATIC_PAGES, add_page, page_h, page_rows
from adaplex_server.kernels.gpu.finish import scale_and_bias, sum_parts
from adaplex_server.kernels.gpu.launch import dependent, next_power_of_2, unfused
from adaplex_server.kernels.gpu.norm import normed


def finish_add_norm(
    x: torch.Tensor, y: Unfinished, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, center: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, N] -> (x + y, its norm). y: of a linear with one target. center: layer norm."""
    x = x.contiguous()
    splits, tokens, n = y.parts.shape
    total, out = torch.empty_like(x), torch.empty_like(x)
    if tokens == 0:
        return total, out
    found, scale = y.shrunk, y.scale
    lora: tuple[Any, ...] = (x, x, x, x, x, x, 0, 0)
    if found is not None:
        slots = found.tiles.slots
        assert slots is not None and len(found.spans) == 1
        lora = (
            found.h, found.b, found.scaling, found.slot_pages, found.slot_page_count, slots, found.h.shape[2],
            found.slot_pages.stride(0),
        )  # fmt: skip
    block = next_power_of_2(n)
    _finish_add_norm[(tokens,)](
        x, y.parts, y.bias if y.bias is not None else x, scale.vectors if scale is not None else x,
        scale.index if scale is not None else x, total, out, weight, bias if bias is not None else weight, eps, *lora,
        tokens,
        N=n, SPLITS=splits, Y_BIAS=y.bias is not None, SCALED=scale is not None, LORA=found is not None,
        STATIC=found is not None and found.tiles.max_pages <= STATIC_PAGES,
        RANK_PAGE=found.page_rows if found is not None else 1, SEGMENTS=found.h.shape[0] if found is not None else 1,
        CENTER=center, BIAS=bias is not None, BLOCK=block, num_warps=min(16, max(1, block // 256)), **dependent(),
        **unfused(),
    )  # fmt: skip
    return total, out


# What changes from step to step must not ask for another compilation.
@triton.jit(do_not_specialize=["tokens", "h_rows"], do_not_specialize_on_alignment=["scale_index_ptr", "slots_ptr"])
def _finish_add_norm(
    x_ptr,
    parts_ptr,
    y_bias_ptr,
    scale_ptr,
    scale_index_ptr,
    total_ptr,
    normed_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    h_ptr,
    b_ptr,
    scaling_ptr,
    pages_ptr,
    page_count_ptr,
    slots_ptr,
    h_rows,
    pages_stride,
    tokens,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    Y_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    LORA: tl.constexpr,
    STATIC: tl.constexpr,
    RANK_PAGE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CENTER: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token."""
    n = tl.arange(0, BLOCK)[None, :]
    mask = n < N
    # One token as a tensor, which the shared helpers want.
    token = tl.program_id(0) + tl.arange(0, 1)
    live = token < tokens
    if LORA:
        slot = tl.load(slots_ptr + tl.program_id(0))
        own_pages = pages_ptr + tl.maximum(slot, 0) * pages_stride
        pages = tl.load(page_count_ptr + slot, mask=slot >= 0, other=0)
        scaling = tl.load(scaling_ptr + slot, mask=slot >= 0, other=0.0)
        if STATIC:
            b0 = page_rows(b_ptr, own_pages, 0, pages, n, mask, N, RANK_PAGE)
            b1 = page_rows(b_ptr, own_pages, 1, pages, n, mask, N, RANK_PAGE)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = token[:, None] * N + n
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    y = sum_parts(parts_ptr, at, mask, tokens * N, SPLITS)
    if LORA:
        if pages > 0:
            delta = tl.zeros((1, BLOCK), tl.float32)
            h = h_ptr + token.to(tl.int64) * h_rows
            part = tokens * h_rows
            if STATIC:
                h0 = page_h(h, live, scaling, part, RANK_PAGE, 1, SEGMENTS)
                h1 = page_h(h + RANK_PAGE, live & (pages > 1), scaling, part, RANK_PAGE, 1, SEGMENTS)
                delta = add_page(add_page(delta, b0, h0, RANK_PAGE), b1, h1, RANK_PAGE)
            else:
                for index in tl.range(0, pages):
                    b = page_rows(b_ptr, own_pages, index, pages, n, mask, N, RANK_PAGE)
                    own_h = page_h(h + index * RANK_PAGE, live, scaling, part, RANK_PAGE, 1, SEGMENTS)
                    delta = add_page(delta, b, own_h, RANK_PAGE)
            y += delta
    y = scale_and_bias(y, token, live, n, mask, scale_ptr, scale_index_ptr, y_bias_ptr, N, SCALED, Y_BIAS)
    x = (x.to(tl.float32) + y).to(x.dtype)
    tl.store(total_ptr + at, x, mask=mask)
    out = normed(x.to(tl.float32), n, mask, weight_ptr, bias_ptr, eps, N, CENTER, BIAS)
    tl.store(normed_ptr + at, out.to(normed_ptr.dtype.element_ty), mask=mask)
