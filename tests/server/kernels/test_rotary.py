"""Rotation and the write into pages on the CPU, against complex multiplication."""

from __future__ import annotations

import pytest
import torch

from adaplex_server.kernels.norm import reference as norm_reference
from adaplex_server.kernels.rotary import rotate_and_write, step_rotation

TOKENS, HEADS, KV, DIM = 5, 4, 2, 16


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x: [T, heads, D]; angles: [T, dim / 2]."""
    half = angles.shape[1]
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    z = torch.complex(x[..., :half].contiguous(), x[..., half : 2 * half].contiguous()) * turn
    return torch.cat((z.real, z.imag, x[..., 2 * half :]), -1)


@pytest.mark.parametrize("dim", [16, 4])
@pytest.mark.parametrize("layout", ["blocks", "heads"])
@pytest.mark.parametrize("normed", [False, True])
def test_equals_complex_multiplication(dim: int, layout: str, normed: bool) -> None:
    torch.manual_seed(0)
    table = torch.arange(50).float().unsqueeze(1) * torch.rand(dim // 2)
    positions, slots = torch.tensor([3, 0, 49, 7, 8]), torch.tensor([9, 4, 11, 5, 6])
    if layout == "blocks":
        fused = torch.randn(TOKENS, HEADS + 2 * KV, DIM)
        q, k, v = fused.split_with_sizes((HEADS, KV, KV), 1)
    else:
        q, k, v = torch.randn(TOKENS, KV, 3, DIM).unbind(2)
    weights = (torch.randn(DIM), torch.randn(DIM)) if normed else (None, None)
    q_in, k_in, v_in = q.clone(), k.clone(), v.clone()
    if normed:
        q_in, k_in = (norm_reference(x, w, None, 1e-6, False) for x, w in zip((q_in, k_in), weights, strict=True))
    keys, values = torch.zeros(3, 4, KV, DIM), torch.zeros(3, 4, KV, DIM)
    rotation = step_rotation(positions, table.cos(), table.sin(), torch.float32)
    got = rotate_and_write(q, k, v, rotation, slots, keys, values, *weights, eps=1e-6)
    torch.testing.assert_close(got, turned(q_in, table[positions]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(keys.view(-1, KV, DIM)[slots], turned(k_in, table[positions]), rtol=1e-5, atol=1e-5)
    assert torch.equal(values.view(-1, KV, DIM)[slots], v_in)
    untouched = [i for i in range(12) if i not in slots.tolist()]
    assert not keys.view(-1, KV, DIM)[untouched].any() and not values.view(-1, KV, DIM)[untouched].any()
