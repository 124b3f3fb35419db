"""Feeding and choosing tokens on the GPU. One launch feeds; two choose: the vocabulary is read once by a few programs a
row, whose candidates one program compares. A largest value is the same in any order, so nothing depends on the split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.gpu.launch import cdiv, next_power_of_2

_BLOCK = 4096
_PART = 2 * _BLOCK


def feed_tokens(tokens: torch.Tensor, sources: torch.Tensor, chosen: torch.Tensor) -> None:
    """See `kernels.feed`."""
    rows = tokens.shape[0]
    if rows:
        _feed[(1,)](tokens, sources, chosen, rows, BLOCK=next_power_of_2(rows), num_warps=1)


def likeliest(logits: torch.Tensor, kept: torch.Tensor, best: torch.Tensor, tokens: torch.Tensor) -> None:
    """See `kernels.feed`."""
    rows, vocab = logits.shape
    if not rows:
        return
    assert logits.stride(1) == kept.stride(1) == 1
    parts = cdiv(vocab, _PART)
    values = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    places = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    _candidates[(parts, rows)](
        logits, logits.stride(0), kept, kept.stride(0), values, places, vocab, PART=_PART, BLOCK=_BLOCK, num_warps=8
    )
    _compare[(rows,)](values, places, best, tokens, vocab, parts, BLOCK=next_power_of_2(parts), num_warps=1)


@triton.jit
def _feed(tokens_ptr, sources_ptr, chosen_ptr, rows, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    source = tl.load(sources_ptr + i, mask=i < rows, other=-1)
    token = tl.load(chosen_ptr + source, mask=source >= 0, other=0)
    tl.store(tokens_ptr + i, token, mask=source >= 0)


@triton.jit
def _candidates(
    logits_ptr,
    logits_stride,
    kept_ptr,
    kept_stride,
    values_ptr,
    places_ptr,
    vocab,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest of a part of a row, and where it is first; -1 for its place if a logit there is not finite."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    top = float("-inf")
    place = vocab
    wrong = 0
    for begin in range(0, PART, BLOCK):
        i = part * PART + begin + tl.arange(0, BLOCK)
        inside = i < vocab
        x = tl.load(logits_ptr + row * logits_stride + i, mask=inside, other=float("-inf"))
        tl.store(kept_ptr + row * kept_stride + i, x, mask=inside)
        finite = tl.abs(x) < float("inf")
        wrong += tl.sum((inside & (finite == 0)).to(tl.int32), 0)
        x = tl.where(finite, x, float("-inf"))
        best = tl.max(x, 0)
        first = tl.min(tl.where(inside & (x == best), i, vocab), 0)
        place = tl.where(best > top, first, place)
        top = tl.maximum(best, top)
    at = row * tl.num_programs(0) + part
    tl.store(values_ptr + at, top)
    tl.store(places_ptr + at, tl.where(wrong > 0, -1, place))


@triton.jit
def _compare(values_ptr, places_ptr, best_ptr, tokens_ptr, vocab, parts, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    values = tl.load(values_ptr + row * parts + i, mask=i < parts, other=float("-inf"))
    places = tl.load(places_ptr + row * parts + i, mask=i < parts, other=vocab)
    wrong = tl.sum((places < 0).to(tl.int32), 0)
    token = tl.min(tl.where((values == tl.max(values, 0)) & (places >= 0), places, vocab), 0)
    token = tl.minimum(token, vocab - 1).to(tl.int64)
    tl.store(tokens_ptr + row, token)
    tl.store(best_ptr + row, tl.where(wrong > 0, -1, token))
