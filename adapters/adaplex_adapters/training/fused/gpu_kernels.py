"""The Triton kernels of a training pass on a GPU; sums in float32, results rounded once. Owns nothing.

A program is a row of values, but for `expand4`: there it is some blocks of codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCKS = 64
_FLAT = 1024
_VOCABULARY = 4096


@triton.jit
def _expand4(
    codes, table, absmax, nested, nested_table, offset, out, blocks,
    NESTED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    there = block < blocks
    if NESTED:
        code = tl.load(absmax + block, mask=there, other=0).to(tl.int32)
        scale = tl.load(nested_table + code) * tl.load(nested + block // GROUP, mask=there, other=0.0)
        scale = scale + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=there, other=0.0)
    byte = block[:, None].to(tl.int64) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    pair = tl.load(codes + byte, mask=there[:, None], other=0).to(tl.int32)
    first = tl.load(table + (pair >> 4)) * scale[:, None]
    second = tl.load(table + (pair & 15)) * scale[:, None]
    values = tl.interleave(first, second)
    place = block[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + place, values.to(out.dtype.element_ty), mask=there[:, None])


def expand4(
    codes: torch.Tensor,
    table: torch.Tensor,
    absmax: torch.Tensor,
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int] | None,
    block: int,
    out: torch.Tensor,
) -> None:
    """Write the values of codes [n / 2] uint8 (the earlier one in the upper half) into out [n].

    table: [16] float32. absmax: [n / block] float32, or uint8 with nested = (scales [groups], table [256], offset [],
    blocks a group).
    """
    blocks = out.numel() // block
    scales, nested_table, offset, group = nested or (absmax, absmax, absmax, 1)
    count = max(1, _BLOCKS * 64 // block)
    _expand4[(triton.cdiv(blocks, count),)](
        codes, table, absmax, scales, nested_table, offset, out, blocks,
        NESTED=nested is not None, GROUP=group, BLOCK=block, COUNT=count, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _norm(x, delta, weight, total, out, root, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < width
    values = tl.load(x + row * width + at, mask=there, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(delta + row * width + at, mask=there, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * width + at, rounded, mask=there)
        values = rounded.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values) / width + eps)
    normed = (values * inverse).to(out.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (normed * w).to(out.dtype.element_ty), mask=there)
    tl.store(root + row, inverse)


@triton.jit
def _norm_gradient(gradient, beside, total, weight, root, out, width, BESIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < width
    g = tl.load(gradient + row * width + at, mask=there, other=0.0).to(tl.float32)
    g = g * tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    inverse = tl.load(root + row)
    normed = tl.load(total + row * width + at, mask=there, other=0.0).to(tl.float32) * inverse
    found = inverse * (g - normed * (tl.sum(g * normed) / width))
    if BESIDE:
        found += tl.load(beside + row * width + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, found.to(out.dtype.element_ty), mask=there)


def norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, delta: [T, H] -> (x + delta, its RMS norm times weight, 1 / RMS [T] float32)."""
    rows, width = x.shape
    total, out = torch.empty_like(x) if delta is not None else x, torch.empty_like(x)
    root = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _norm[(rows,)](
        x, delta if delta is not None else x, weight, total, out, root, width, eps, ADD=delta is not None,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return total, out, root


def norm_gradient(
    gradient: torch.Tensor,
    beside: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor,
    root: torch.Tensor,
) -> torch.Tensor:
    """The gradient [T, H] of what `norm` normed, plus `beside`."""
    rows, width = gradient.shape
    out = torch.empty_like(gradient)
    block = triton.next_power_of_2(width)
    _norm_gradient[(rows,)](
        gradient, beside if beside is not None else gradient, total, weight, root, out, width,
        BESIDE=beside is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


@triton.jit
def _gated(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    g = tl.load(gate + at, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=there)


@triton.jit
def _gated_gradient(gate, up, gradient, to_gate, to_up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    g = tl.load(gate + at, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=there, other=0.0).to(tl.float32)
    d = tl.load(gradient + at, mask=there, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    active = g * share
    kind = out.dtype.element_ty
    tl.store(out + at, (active * u).to(kind), mask=there)
    tl.store(to_up + at, (d * active).to(kind), mask=there)
    tl.store(to_gate + at, (d * u * share * (1.0 + g * (1.0 - share))).to(kind), mask=there)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    out = torch.empty_like(gate)
    _gated[(triton.cdiv(gate.numel(), _FLAT),)](gate, up, out, gate.numel(), BLOCK=_FLAT)
    return out


def gated_gradient(
    gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of gate, gradient of up, silu(gate) * up); the first takes `gradient`'s place."""
    to_up, out = torch.empty_like(up), torch.empty_like(gate)
    _gated_gradient[(triton.cdiv(gate.numel(), _FLAT),)](
        gate, up, gradient, gradient, to_up, out, gate.numel(), BLOCK=_FLAT
    )
    return gradient, to_up, out


@triton.jit
def _rotated(
    x, cos, sin, out, length, heads, half, sign, HEADS: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, HALF)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    there = (head < heads) & (at < half)
    angle = (token % length) * 2 * half + at
    c = tl.load(cos + angle, mask=at < half, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=at < half, other=0.0).to(tl.float32) * sign
    place = (token * heads + head) * 2 * half + at
    low = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    high = tl.load(x + place + half, mask=there, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + place, (low * c - high * s).to(kind), mask=there)
    tl.store(out + place + half, (high * c + low * s).to(kind), mask=there)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """x: [rows, L, heads, D] turned by the angles of cos, sin [L, D] (both halves alike), back where sign is -1."""
    rows, length, heads, width = x.shape
    out = torch.empty_like(x)
    _rotated[(rows * length,)](
        x, cos, sin, out, length, heads, width // 2, sign,
        HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(width // 2), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _surprise(logits, targets, losses, width, ignored, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    target = tl.load(targets + row)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for begin in range(0, width, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher))
        highest = higher
    counts = target != ignored
    known = tl.load(logits + tl.where(counts, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(counts, highest + tl.log(total) - known, 0.0))
    if GRADIENT:
        tl.debug_barrier()
        for begin in range(0, width, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            x = tl.load(logits + at, mask=at < width, other=-float("inf")).to(tl.float32)
            slope = tl.exp(x - highest) / total - tl.where(at == target, 1.0, 0.0)
            slope = tl.where(counts, slope, 0.0)
            tl.store(logits + at, slope.to(logits.dtype.element_ty), mask=at < width)


def surprise(logits: torch.Tensor, targets: torch.Tensor, ignored: int, gradient: bool) -> torch.Tensor:
    """-log p [n] float32 of the targets [n] int64, 0 where one is `ignored`; with `gradient` the logits [n, V] become
    their own gradient.
    """
    losses = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    _surprise[(len(targets),)](
        logits, targets, losses, logits.shape[1], ignored, GRADIENT=gradient, BLOCK=_VOCABULARY, num_warps=8
    )
    return losses


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))
