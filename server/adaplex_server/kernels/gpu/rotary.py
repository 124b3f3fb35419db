"""Rotary positions and the write of keys and values into their pages, in one launch on the GPU, with the norm over each
head where a family has one.

Rotation is in halves (RoFormer, Su et al. 2021, in the layout of Hugging Face): dimension i < dim / 2 turns with i +
dim / 2 by the position times frequency i; dimensions from dim on pass. Arithmetic in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adaplex_server.kernels.gpu.launch import cdiv, next_power_of_2

_HEADS_A_PROGRAM = 4


def rotate_and_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate q [T, H, D] in place; write k rotated and v [T, KV, D] to `keys` and `values` [pages, page_size, KV, D] at
    kv_slots [T]. A token whose slot is negative (the padding of a captured step) writes no key and no value.

    q, k, v may be views of one fused tensor (last dimension contiguous). cos, sin: [positions, dim / 2] float32,
    contiguous. q_weight, k_weight: [D], of the root-mean-square norm over a head before the rotation.
    """
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    if tokens == 0:
        return
    blocks = cdiv(heads, _HEADS_A_PROGRAM), cdiv(kv_heads, _HEADS_A_PROGRAM)
    _rotate[(tokens, blocks[0] + 2 * blocks[1])](
        q, k, v, positions, kv_slots, cos, sin, keys, values,
        q_weight if q_weight is not None else cos, k_weight if k_weight is not None else cos, eps,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, HALF=cos.shape[1], BLOCK_H=_HEADS_A_PROGRAM,
        BLOCK_R=next_power_of_2(cos.shape[1]), BLOCK_D=next_power_of_2(dim), NORM=q_weight is not None, num_warps=2,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rotate(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    slots_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    q_weight_ptr,
    k_weight_ptr,
    eps,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
):
    """BLOCK_H heads of q, k or v of one token."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    Q_BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    KV_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    slot = tl.load(slots_ptr + token)
    if block < Q_BLOCKS:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)
        source = q_ptr + token * q_token + head * q_head
        _turn(
            source, source, head < HEADS, tl.load(positions_ptr + token), cos_ptr, sin_ptr, q_weight_ptr, eps,
            DIM, HALF, BLOCK_R, BLOCK_D, NORM, False,
        )  # fmt: skip
    elif block < Q_BLOCKS + KV_BLOCKS:
        head = (block - Q_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
        _turn(
            k_ptr + token * k_token + head * k_head, keys_ptr + (slot * KV_HEADS + head) * DIM,
            (head < KV_HEADS) & (slot >= 0),
            tl.load(positions_ptr + token), cos_ptr, sin_ptr, k_weight_ptr, eps,
            DIM, HALF, BLOCK_R, BLOCK_D, NORM, True,
        )  # fmt: skip
    else:
        head = (block - Q_BLOCKS - KV_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
        d = tl.arange(0, BLOCK_D)
        mask = ((head < KV_HEADS) & (slot >= 0))[:, None] & (d < DIM)[None, :]
        v = tl.load(v_ptr + token * v_token + head[:, None] * v_head + d[None, :], mask=mask, other=0.0)
        tl.store(values_ptr + (slot * KV_HEADS + head)[:, None] * DIM + d[None, :], v, mask=mask)


@triton.jit
def _turn(
    source,
    target,
    live,
    position,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    eps,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    COPY: tl.constexpr,
):
    """Heads at `source` to `target` (both [heads] pointers); COPY: the dimensions that pass are moved too."""
    T: tl.constexpr = target.dtype.element_ty
    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (r < HALF)[None, :]
    rest = live[:, None] & ((d >= 2 * HALF) & (d < DIM))[None, :]
    x = tl.load(source[:, None] + r[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(source[:, None] + HALF + r[None, :], mask=mask, other=0.0).to(tl.float32)
    passed = tl.load(source[:, None] + d[None, :], mask=rest, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(x * x, 1) + tl.sum(y * y, 1) + tl.sum(passed * passed, 1)
        inverse = tl.rsqrt(squares / DIM + eps)[:, None]
        x = x * inverse * tl.load(weight_ptr + r, mask=r < HALF, other=0.0).to(tl.float32)[None, :]
        y = y * inverse * tl.load(weight_ptr + HALF + r, mask=r < HALF, other=0.0).to(tl.float32)[None, :]
        passed = passed * inverse * tl.load(weight_ptr + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
    cos = tl.load(cos_ptr + position * HALF + r, mask=r < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + r, mask=r < HALF, other=0.0)[None, :]
    tl.store(target[:, None] + r[None, :], (x * cos - y * sin).to(T), mask=mask)
    tl.store(target[:, None] + HALF + r[None, :], (y * cos + x * sin).to(T), mask=mask)
    if COPY or NORM:
        tl.store(target[:, None] + d[None, :], passed.to(T), mask=rest)
