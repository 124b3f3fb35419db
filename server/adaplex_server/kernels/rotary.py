"""Rotary positions (RoFormer, Su et al. 2021) and the write of keys and values into their pages.

In halves, as Hugging Face lays checkpoints out: with c = cos(position * frequency_i), s = sin(position * frequency_i),

    (x_i, x_{i + dim/2}) -> (x_i c - x_{i + dim/2} s, x_{i + dim/2} c + x_i s)      i < dim / 2

and dimensions of a head from `dim` on pass. Some families norm each head (root mean square) before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaplex_server.kernels.norm import rms_norm


@dataclass(frozen=True)
class Rotation:
    """What a step's layers share. On CUDA cos and sin are the whole tables, [positions, dim / 2] float32.

    Elsewhere they are the step's own, [T, 1, dim] in the dtype of the activations, and the first half of sin is
    negated: then a head is turned by x * cos + (x with its halves swapped) * sin.
    """

    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


def step_rotation(
    positions: torch.Tensor, cos_table: torch.Tensor, sin_table: torch.Tensor, dtype: torch.dtype
) -> Rotation:
    """positions: [T] int64; tables: [positions, dim / 2] float32."""
    if positions.is_cuda:
        return Rotation(positions, cos_table, sin_table)
    cos, sin = cos_table[positions].to(dtype), sin_table[positions].to(dtype)
    return Rotation(positions, torch.cat((cos, cos), 1).unsqueeze(1), torch.cat((-sin, sin), 1).unsqueeze(1))


def rotate_and_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotation: Rotation,
    kv_slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Returns q rotated, [T, H, D]; writes k rotated and v, [T, KV, D], to `keys` and `values` [pages, page_size, KV,
    D] at kv_slots [T].

    q, k, v may be views of one tensor, last dimension contiguous; q may be overwritten. q_weight, k_weight: [D], of
    the norm over a head.
    """
    if q.is_cuda:
        from adaplex_server.kernels.gpu import rotary as gpu

        gpu.rotate_and_write(
            q, k, v, rotation.positions, kv_slots, rotation.cos, rotation.sin, keys, values, q_weight, k_weight, eps
        )
        return q
    heads, (_, kv_heads, dim) = q.shape[1], k.shape
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    joined = _joined(q, k)
    if joined is not None:
        turned = _turned(joined, rotation)
        q, k = turned[:, :heads], turned[:, heads:]
    else:
        q, k = _turned(q, rotation), _turned(k, rotation)
    keys.view(-1, kv_heads, dim).index_copy_(0, kv_slots, k)
    values.view(-1, kv_heads, dim).index_copy_(0, kv_slots, v)
    return q


def _joined(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """q and k as one tensor where k's heads follow q's in memory, which halves the number of operations."""
    if q.stride() != k.stride() or k.data_ptr() != q.data_ptr() + q.shape[1] * q.stride(1) * q.itemsize:
        return None
    return q.as_strided((q.shape[0], q.shape[1] + k.shape[1], q.shape[2]), q.stride())


def _turned(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """x: [T, heads, D]. A new tensor."""
    dim = rotation.cos.shape[2]
    if dim < x.shape[2]:
        return torch.cat((_turned(x[..., :dim], rotation), x[..., dim:]), -1)
    return (x * rotation.cos).addcmul_(x.roll(dim // 2, -1), rotation.sin)
