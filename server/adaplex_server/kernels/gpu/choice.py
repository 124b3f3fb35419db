"""A random token of each row on the GPU, in one launch that never asks the host, without sorting the vocabulary.

The reference, and the order of the filters, is `kernels/choice.py`: of the tokens in the order of falling probability
(ties: lower id first) each filter keeps a beginning, and the token is where u times the mass of the shortest of them
falls in the running sum. So up to three questions are asked of a row, all of the form: the smallest t such that what is
larger than t, counted or weighed, is less than a bound. Each is answered by cutting the range of t into four again and
again until a single value is left.

A pass over the vocabulary is dear, so what is heavier than a cut, one of a few that leaves at most `_SHORT` tokens, is
listed first. A question whose answer lies in that list is asked of it, and of the whole vocabulary otherwise.

Weights, exp((x - max) / temperature), are compared by their bits as float32 and summed as integers of 2^-42: such sums
are exact in any order, so a row's token depends on the row alone. What is below 2^-42 of the likeliest token is never
chosen. One program a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096
_SHORT = 4096
_ONE = tl.constexpr(0x3F800000)
_OCTAVE = tl.constexpr(0x00800000)
_NONE = tl.constexpr(0x7FFFFFFF)
_ALL = tl.constexpr(1 << 40)
_UNIT = tl.constexpr(float(1 << 42))


def choose(logits: torch.Tensor, wishes: torch.Tensor) -> torch.Tensor:
    """logits: [R, V] float32. wishes: [R, 5] float64, of each row temperature (over 0), u in [0, 1), top_k (0: all),
    top_p and min_p. Ids [R] int64; of a row that is not finite any token.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1 and wishes.is_contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    # Of each row the bits of all weights, those of the short list, and its ids.
    weights = torch.empty(rows, vocab + 2 * _SHORT, dtype=torch.int32, device=logits.device)
    if rows:
        _choose[(rows,)](
            logits, logits.stride(0), wishes, weights, tokens, vocab, SHORT=_SHORT, BLOCK=_BLOCK, num_warps=16
        )
    return tokens


@triton.jit
def _fixed(bits):
    return (bits.to(tl.float32, bitcast=True) * _UNIT).to(tl.int64)


@triton.jit
def _weigh(logits_ptr, weights_ptr, vocab, temperature, SHORT: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the weights' bits. Returns the sum of all, the lowest cut above which there are at most SHORT, and their
    number.
    """
    i = tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    for begin in range(0, vocab, BLOCK):
        at = begin + i
        tops = tl.maximum(tops, tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")))
    top = tl.max(tops, 0)
    sums = tl.zeros((BLOCK,), tl.int64)
    # Weights above 2^-2, 2^-5, 2^-9 and 2^-14; the first two and the last two share a word, 16 bits each.
    some = tl.zeros((BLOCK,), tl.int32)
    many = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, vocab, BLOCK):
        at = begin + i
        x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf"))
        weight = tl.exp((x - top) / temperature)
        # Not NaN, and not above 1, whatever the logits are.
        weight = tl.where((weight >= 0) & (weight <= 1), weight, 0.0)
        bits = weight.to(tl.int32, bitcast=True)
        tl.store(weights_ptr + at, bits, mask=at < vocab)
        sums += _fixed(bits)
        some += (bits > _ONE - 2 * _OCTAVE).to(tl.int32) + ((bits > _ONE - 5 * _OCTAVE).to(tl.int32) << 16)
        many += (bits > _ONE - 9 * _OCTAVE).to(tl.int32) + ((bits > _ONE - 14 * _OCTAVE).to(tl.int32) << 16)
    tl.debug_barrier()
    cut, count = _lower(some & 0xFFFF, 2, _ONE, 0, SHORT)
    cut, count = _lower(some >> 16, 5, cut, count, SHORT)
    cut, count = _lower(many & 0xFFFF, 9, cut, count, SHORT)
    cut, count = _lower(many >> 16, 14, cut, count, SHORT)
    return tl.sum(sums, 0), cut, count


@triton.jit
def _lower(counts, octaves, cut, count, SHORT: tl.constexpr):
    """The lower cut, if what is above it is not too much for the list."""
    found = tl.sum(counts, 0)
    return tl.where(found <= SHORT, _ONE - octaves * _OCTAVE, cut), tl.where(found <= SHORT, found, count)


@triton.jit
def _list(weights_ptr, vocab, cut, SHORT: tl.constexpr, BLOCK: tl.constexpr):
    """The bits above the cut and their ids, in the order of ids, behind the row's weights."""
    i = tl.arange(0, BLOCK)
    before = 0
    for begin in range(0, vocab, BLOCK):
        at = begin + i
        bits = tl.load(weights_ptr + at, mask=at < vocab, other=-1)
        kept = (bits > cut).to(tl.int32)
        here = tl.sum(kept, 0)
        if here > 0:
            place = vocab + before + tl.cumsum(kept, 0) - 1
            tl.store(weights_ptr + place, bits, mask=kept > 0)
            tl.store(weights_ptr + place + SHORT, at, mask=kept > 0)
        before += here
    tl.debug_barrier()


@triton.jit
def _larger(bits_ptr, count, t, BLOCK: tl.constexpr):
    """Of the bits above t: the sum of their weights; and how many equal t, and the first place of these."""
    i = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.int64)
    equals = tl.zeros((BLOCK,), tl.int32)
    first = tl.full((BLOCK,), _NONE, tl.int32)
    for begin in range(0, count, BLOCK):
        at = begin + i
        bits = tl.load(bits_ptr + at, mask=at < count, other=-1)
        sums += tl.where(bits > t, _fixed(tl.maximum(bits, 0)), 0)
        equals += (bits == t).to(tl.int32)
        first = tl.where((bits == t) & (at < first), at, first)
    return tl.sum(sums, 0), tl.sum(equals, 0), tl.min(first, 0)


@triton.jit
def _smallest(bits_ptr, count, low, bound, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest t above `low` such that the weights above it sum up to less than `bound`, or COUNT fewer than it;
    and their sum or count. The bound is at least 1, and `low` itself is too small.
    """
    i = tl.arange(0, BLOCK)
    high = tl.full((), _ONE, tl.int32)
    above = tl.full((), 0, tl.int64)
    while high - low > 1:
        quarter = (high - low) // 4
        first, second, third = low + tl.maximum(quarter, 1), low + (high - low) // 2, high - tl.maximum(quarter, 1)
        sums1 = tl.zeros((BLOCK,), tl.int64)
        sums2 = tl.zeros((BLOCK,), tl.int64)
        sums3 = tl.zeros((BLOCK,), tl.int64)
        leasts = tl.full((BLOCK,), _NONE, tl.int32)
        mosts = tl.full((BLOCK,), -1, tl.int32)
        for begin in range(0, count, BLOCK):
            at = begin + i
            bits = tl.load(bits_ptr + at, mask=at < count, other=-1)
            value = (bits >= 0).to(tl.int64) if COUNT else _fixed(tl.maximum(bits, 0))
            sums1 += tl.where(bits > first, value, 0)
            sums2 += tl.where(bits > second, value, 0)
            sums3 += tl.where(bits > third, value, 0)
            inside = (bits > low) & (bits <= high)
            leasts = tl.minimum(leasts, tl.where(inside, bits, _NONE))
            mosts = tl.maximum(mosts, tl.where(inside, bits, -1))
        least, most = tl.min(leasts, 0), tl.max(mosts, 0)
        sum1, sum2, sum3 = tl.sum(sums1, 0), tl.sum(sums2, 0), tl.sum(sums3, 0)
        if least >= most:
            # One value (or none) is left: the answer, as the sums change at values only.
            high = tl.where(least == most, most, high)
            low = high - 1
        elif sum1 < bound:
            high, above = first, sum1
        elif sum2 < bound:
            low, high, above = first, second, sum2
        elif sum3 < bound:
            low, high, above = second, third, sum3
        else:
            low = third
    return high, above


@triton.jit
def _nth_equal(bits_ptr, count, t, nth, BLOCK: tl.constexpr):
    """The place of number `nth` (from 0) of the bits that equal t."""
    i = tl.arange(0, BLOCK)
    place = count
    before = tl.full((), 0, tl.int64)
    for begin in range(0, count, BLOCK):
        at = begin + i
        equal = (tl.load(bits_ptr + at, mask=at < count, other=-1) == t).to(tl.int32)
        here = before + tl.cumsum(equal, 0)
        place = tl.minimum(place, tl.min(tl.where((equal > 0) & (here == nth + 1), at, count), 0))
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
def _shorter(least, ties, t, kept):
    """Two beginnings, each all above a value and so many of those equal to it: the shorter one."""
    ties = tl.where(t > least, kept, tl.where(t == least, tl.minimum(ties, kept), ties))
    return tl.maximum(least, t), ties


@triton.jit
def _choose(
    logits_ptr,
    logits_stride,
    wishes_ptr,
    weights_ptr,
    tokens_ptr,
    vocab,
    SHORT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(wishes_ptr + row * 5).to(tl.float32)
    u = tl.load(wishes_ptr + row * 5 + 1)
    top_k = tl.load(wishes_ptr + row * 5 + 2).to(tl.int64)
    top_p = tl.load(wishes_ptr + row * 5 + 3)
    min_p = tl.load(wishes_ptr + row * 5 + 4)
    weights_ptr += row * (vocab + 2 * SHORT)
    total, cut, listed = _weigh(logits_ptr + row * logits_stride, weights_ptr, vocab, temperature, SHORT, BLOCK)
    if (top_k <= 0) & (top_p >= 1) & (min_p <= 0):
        place = _by_id(weights_ptr, vocab, (u * total.to(tl.float64)).to(tl.int64), BLOCK)
    else:
        _list(weights_ptr, vocab, cut, SHORT, BLOCK)
        in_list, _, _ = _larger(weights_ptr + vocab, listed, cut, BLOCK)
        # Kept are the weights above `least`, and the first `ties` of those equal to it.
        smallest = min_p.to(tl.float32)
        least = smallest.to(tl.int32, bitcast=True) + (smallest.to(tl.float64) < min_p).to(tl.int32)
        ties = tl.full((), _ALL, tl.int64)
        mass = total
        if (top_k > 0) & (top_k < vocab):
            short = top_k <= listed
            bits_ptr, count = weights_ptr + tl.where(short, vocab, 0), tl.where(short, listed, vocab)
            t, above = _smallest(bits_ptr, count, tl.where(short, cut, -1), top_k, True, BLOCK)
            sums, _, _ = _larger(bits_ptr, count, t, BLOCK)
            mass = sums + (top_k - above) * _fixed(t)
            least, ties = _shorter(least, ties, t, top_k - above)
        if top_p < 1:
            exact = top_p * mass.to(tl.float64)
            bound = exact.to(tl.int64)
            bound = tl.maximum(bound + (bound.to(tl.float64) < exact).to(tl.int64), 1)
            short = bound <= in_list
            bits_ptr, count = weights_ptr + tl.where(short, vocab, 0), tl.where(short, listed, vocab)
            t, above = _smallest(bits_ptr, count, tl.where(short, cut, -1), bound, False, BLOCK)
            weight = tl.maximum(_fixed(t), 1)
            least, ties = _shorter(least, ties, t, tl.where(t > 0, (bound - above + weight - 1) // weight, _ALL))
        short = least > cut
        bits_ptr, count = weights_ptr + tl.where(short, vocab, 0), tl.where(short, listed, vocab)
        sums, equals, _ = _larger(bits_ptr, count, least, BLOCK)
        mass = sums + tl.minimum(ties, equals.to(tl.int64)) * _fixed(least)
        target = tl.minimum((u * mass.to(tl.float64)).to(tl.int64), mass - 1)
        short = target < in_list
        bits_ptr, count = weights_ptr + tl.where(short, vocab, 0), tl.where(short, listed, vocab)
        t, above = _smallest(bits_ptr, count, tl.where(short, cut, -1), tl.maximum(target + 1, 1), False, BLOCK)
        _, equals, place = _larger(bits_ptr, count, t, BLOCK)
        if equals > 1:
            nth = (target - above) // tl.maximum(_fixed(t), 1)
            place = _nth_equal(bits_ptr, count, t, nth, BLOCK)
        if short & (place < listed):
            place = tl.load(weights_ptr + vocab + SHORT + place)
    tl.store(tokens_ptr + row, tl.minimum(place, vocab - 1).to(tl.int64))
