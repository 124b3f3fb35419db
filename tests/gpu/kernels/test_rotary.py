"""Rotation and the write into pages, for fused and interleaved layouts of q, k and v."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from adaplex_server.kernels.gpu.rotary import rotate_and_write

TOKENS, HEADS, KV_HEADS, DIM = 7, 6, 2, 24


@pytest.mark.parametrize("half", [12, 4])
@pytest.mark.parametrize("with_norm", [False, True])
def test_rotation(
    half: int, with_norm: bool, dtype: torch.dtype, device: torch.device, check: Callable[..., None]
) -> None:
    fused = torch.randn(TOKENS, HEADS + 2 * KV_HEADS, DIM, dtype=dtype, device=device)
    q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    angles = torch.arange(64, device=device)[:, None] * torch.rand(half, device=device)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(0, 64, (TOKENS,), device=device)
    slots = torch.randperm(4 * 16, device=device)[:TOKENS]
    keys, values = torch.zeros(2, 4, 16, KV_HEADS, DIM, dtype=dtype, device=device)
    q_weight, k_weight = torch.randn(2, DIM, dtype=dtype, device=device)

    def rotated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.double()
        if with_norm:
            x = F.rms_norm(x, (DIM,), weight.double(), 1e-6)
        c, s = cos[positions][:, None].double(), sin[positions][:, None].double()
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((first * c - second * s, second * c + first * s, rest), dim=-1)

    expected_q, expected_k, before = rotated(q, q_weight), rotated(k, k_weight), fused.clone()
    weights = (q_weight, k_weight) if with_norm else (None, None)
    rotate_and_write(q, k, v, positions, slots, cos, sin, keys, values, *weights, 1e-6)
    check(q, expected_q)
    check(keys.flatten(0, 1)[slots], expected_k)
    assert torch.equal(values.flatten(0, 1)[slots], before[:, HEADS + KV_HEADS :])
    assert torch.equal(fused[:, HEADS:], before[:, HEADS:]), "only q is changed in place"
    untouched = torch.ones(4 * 16, dtype=torch.bool, device=device)
    untouched[slots] = False
    assert not keys.flatten(0, 1)[untouched].any()
    assert not values.flatten(0, 1)[untouched].any()


def test_heads_that_interleave_q_k_and_v(device: torch.device, check: Callable[..., None]) -> None:
    """GPT-NeoX's layout: (q, k, v) of head 0, then of head 1."""
    fused = torch.randn(3, HEADS, 3, DIM, device=device)
    cos, sin = torch.ones(8, 4, device=device), torch.zeros(8, 4, device=device)
    keys, values = torch.zeros(2, 1, 16, HEADS, DIM, device=device)
    before = fused.clone()
    slots = torch.tensor([5, 2, 9], device=device)
    rotate_and_write(
        fused[:, :, 0], fused[:, :, 1], fused[:, :, 2], torch.zeros_like(slots), slots, cos, sin, keys, values
    )
    assert torch.equal(fused, before), "a turn by nothing changes nothing"
    assert torch.equal(keys[0, slots], before[:, :, 1])
    assert torch.equal(values[0, slots], before[:, :, 2])


def test_a_token_without_a_place_writes_nothing(dtype: torch.dtype, device: torch.device) -> None:
    fused = torch.randn(3, HEADS + 2 * KV_HEADS, DIM, dtype=dtype, device=device)
    q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    cos, sin = torch.ones(8, 4, device=device), torch.zeros(8, 4, device=device)
    memory = torch.zeros(2, 3, 16, KV_HEADS, DIM, dtype=dtype, device=device)
    keys, values = memory[:, 1]
    slots = torch.tensor([-1, 2, -1], device=device)
    rotate_and_write(q, k, v, torch.zeros_like(slots), slots, cos, sin, keys[None], values[None])
    assert torch.equal(keys[2], k[1]) and torch.equal(values[2], v[1])
    keys[2] = values[2] = 0
    assert not memory.any()
