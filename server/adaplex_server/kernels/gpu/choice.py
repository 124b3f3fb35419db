"""A random token of each row on the GPU, in one launch that never asks the host, without sorting the vocabulary.

The reference, and the order of the filters, is `engine/choice.py`: of the tokens in the order of falling probability
(ties: lower id first) each filter keeps a beginning, and the token is where u times the mass of the shortest of them
falls in the running sum. So three questions are asked of a row, all of the form: the smallest t such that what is
larger than t, counted or weighed, is less than a bound. Each is answered by cutting the range of t into nine again and
again, one pass over the row's weights for eight cuts; rounds end when a single value is left.

Weights, exp((x - max) / temperature), are compared by their bits as float32 and summed as integers of 2^-42: such sums
are exact in any order, so a row's token depends on the row alone. What is below 2^-42 of the likeliest token is never
chosen. One program a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048
_ONE = tl.constexpr(0x3F800000)
_ALL = tl.constexpr(1 << 40)
_UNIT = tl.constexpr(float(1 << 42))


def choose(logits: torch.Tensor, wishes: torch.Tensor) -> torch.Tensor:
    """logits: [R, V] float32. wishes: [R, 5] float64, of each row temperature (over 0), u in [0, 1), top_k (0: all),
    top_p and min_p. Ids [R] int64; of a row that is not finite any token.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1 and wishes.is_contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    weights = torch.empty(rows, vocab, dtype=torch.int32, device=logits.device)
    if rows:
        _choose[(rows,)](logits, logits.stride(0), wishes, weights, tokens, vocab, BLOCK=_BLOCK, num_warps=16)
    return tokens


@triton.jit
def _fixed(bits):
    return (bits.to(tl.float32, bitcast=True) * _UNIT).to(tl.int64)


@triton.jit
def _weigh(logits_ptr, weights_ptr, vocab, temperature, BLOCK: tl.constexpr):
    """Writes the weights' bits; returns the sum of all."""
    i = tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    for begin in range(0, vocab, BLOCK):
        at = begin + i
        tops = tl.maximum(tops, tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")))
    top = tl.max(tops, 0)
    sums = tl.zeros((BLOCK,), tl.int64)
    for begin in range(0, vocab, BLOCK):
        at = begin + i
        x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf"))
        weight = tl.exp((x - top) / temperature)
        # Not NaN, and not above 1, whatever the logits are.
        weight = tl.where((weight >= 0) & (weight <= 1), weight, 0.0)
        bits = weight.to(tl.int32, bitcast=True)
        tl.store(weights_ptr + at, bits, mask=at < vocab)
        sums += _fixed(bits)
    tl.debug_barrier()
    return tl.sum(sums, 0)


@triton.jit
def _larger(weights_ptr, vocab, t, BLOCK: tl.constexpr):
    """Of the weights above t: the sum; and how many equal t, and the first of these."""
    i = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.int64)
    equals = tl.zeros((BLOCK,), tl.int32)
    first = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    for begin in range(0, vocab, BLOCK):
        at = begin + i
        bits = tl.load(weights_ptr + at, mask=at < vocab, other=-1)
        sums += tl.where(bits > t, _fixed(tl.maximum(bits, 0)), 0)
        equals += (bits == t).to(tl.int32)
        first = tl.where((bits == t) & (at < first), at, first)
    return tl.sum(sums, 0), tl.sum(equals, 0), tl.min(first, 0)


@triton.jit
def _smallest(weights_ptr, vocab, bound, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest t such that the weights above it sum up to less than `bound`, or COUNT fewer than it; and their sum
    or count. The bound is at least 1.
    """
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, 8)
    low = tl.full((), -1, tl.int64)
    high = tl.full((), _ONE, tl.int64)
    above = tl.full((), 0, tl.int64)
    while high - low > 1:
        cuts = low + (high - low) * (j + 1) // 9
        sums = tl.zeros((BLOCK, 8), tl.int64)
        least = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
        most = tl.full((BLOCK,), -1, tl.int32)
        for begin in range(0, vocab, BLOCK):
            at = begin + i
            bits = tl.load(weights_ptr + at, mask=at < vocab, other=-1)
            value = (bits >= 0).to(tl.int64) if COUNT else _fixed(tl.maximum(bits, 0))
            sums += tl.where(bits[:, None] > cuts[None, :], value[:, None], 0)
            inside = (bits > low) & (bits <= high)
            least = tl.minimum(least, tl.where(inside, bits, 0x7FFFFFFF))
            most = tl.maximum(most, tl.where(inside, bits, -1))
        found = tl.sum(sums, 0)
        first, last = tl.min(least, 0).to(tl.int64), tl.max(most, 0).to(tl.int64)
        if first >= last:
            # One value (or none) is left: the answer, as the sums change at values only.
            high = tl.where(first == last, last, high)
            low = high - 1
        else:
            fits = found < bound
            lowest = tl.min(tl.where(fits, cuts, high), 0)
            above = tl.where(lowest < high, tl.max(tl.where(cuts == lowest, found, -1), 0), above)
            low = tl.max(tl.where(fits, low, cuts), 0)
            high = lowest
    return high, above


@triton.jit
def _nth_equal(weights_ptr, vocab, t, nth, BLOCK: tl.constexpr):
    """The place of the weight number `nth` (from 0) of those that equal t."""
    i = tl.arange(0, BLOCK)
    place = vocab
    before = tl.full((), 0, tl.int64)
    for begin in range(0, vocab, BLOCK):
        at = begin + i
        equal = (tl.load(weights_ptr + at, mask=at < vocab, other=-1) == t).to(tl.int64)
        here = before + tl.cumsum(equal, 0)
        place = tl.minimum(place, tl.min(tl.where((equal > 0) & (here == nth + 1), at, vocab), 0))
        before += tl.sum(equal, 0)
    return place


@triton.jit
def _by_id(weights_ptr, vocab, target, BLOCK: tl.constexpr):
    """The first place at which the running sum in the order of ids is above the target."""
    i = tl.arange(0, BLOCK)
    place = vocab
    before = tl.full((), 0, tl.int64)
    for begin in range(0, vocab, BLOCK):
        at = begin + i
        weight = _fixed(tl.maximum(tl.load(weights_ptr + at, mask=at < vocab, other=-1), 0))
        here = tl.sum(weight, 0)
        if (before <= target) & (before + here > target):
            sums = before + tl.cumsum(weight, 0)
            place = tl.min(tl.where(sums > target, at, vocab), 0)
        before += here
    return place


@triton.jit
def _choose(logits_ptr, logits_stride, wishes_ptr, weights_ptr, tokens_ptr, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(wishes_ptr + row * 5).to(tl.float32)
    u = tl.load(wishes_ptr + row * 5 + 1)
    top_k = tl.load(wishes_ptr + row * 5 + 2).to(tl.int64)
    top_p = tl.load(wishes_ptr + row * 5 + 3)
    min_p = tl.load(wishes_ptr + row * 5 + 4)
    weights_ptr += row * vocab
    total = _weigh(logits_ptr + row * logits_stride, weights_ptr, vocab, temperature, BLOCK)
    if (top_k <= 0) & (top_p >= 1) & (min_p <= 0):
        place = _by_id(weights_ptr, vocab, (u * total.to(tl.float64)).to(tl.int64), BLOCK)
    else:
        # Kept are the weights above `least`, and the first `ties` of those equal to it.
        smallest = min_p.to(tl.float32)
        least = smallest.to(tl.int32, bitcast=True).to(tl.int64) + (smallest.to(tl.float64) < min_p).to(tl.int64)
        ties = tl.full((), _ALL, tl.int64)
        mass = total
        if (top_k > 0) & (top_k < vocab):
            t, above = _smallest(weights_ptr, vocab, top_k, True, BLOCK)
            sums, _, _ = _larger(weights_ptr, vocab, t, BLOCK)
            mass = sums + (top_k - above) * _fixed(t.to(tl.int32))
            ties = tl.where(t > least, top_k - above, tl.where(t == least, tl.minimum(ties, top_k - above), ties))
            least = tl.maximum(least, t)
        if top_p < 1:
            exact = top_p * mass.to(tl.float64)
            bound = exact.to(tl.int64)
            bound = tl.maximum(bound + (bound.to(tl.float64) < exact).to(tl.int64), 1)
            t, above = _smallest(weights_ptr, vocab, bound, False, BLOCK)
            weight = tl.maximum(_fixed(t.to(tl.int32)), 1)
            kept = tl.where(t > 0, (bound - above + weight - 1) // weight, _ALL)
            ties = tl.where(t > least, kept, tl.where(t == least, tl.minimum(ties, kept), ties))
            least = tl.maximum(least, t)
        sums, equals, _ = _larger(weights_ptr, vocab, least, BLOCK)
        mass = sums + tl.minimum(ties, equals.to(tl.int64)) * _fixed(least.to(tl.int32))
        target = tl.minimum((u * mass.to(tl.float64)).to(tl.int64), mass - 1)
        t, above = _smallest(weights_ptr, vocab, tl.maximum(target + 1, 1), False, BLOCK)
        _, equals, place = _larger(weights_ptr, vocab, t, BLOCK)
        if equals > 1:
            nth = (target - above) // tl.maximum(_fixed(t.to(tl.int32)), 1)
            place = _nth_equal(weights_ptr, vocab, t, nth, BLOCK)
    tl.store(tokens_ptr + row, tl.minimum(place, vocab - 1).to(tl.int64))
