"""A product of few rows with a bfloat16 weight on Hopper (compute capability 9.0): the driver of `linear16.cu`.

The same sums as the Triton kernel (`kernels.gpu.linear16`), bit for bit: float32, in the order of k, in steps of 16.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from adaplex_server.kernels.cuda.launch import Kernel, pointer, tensor_map

_TOKENS = (32, 48, 64, 96, 128)
_SHARED_BYTES = 227 << 10
_MULTIPROCESSORS = 132


def usable(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether this kernel is for these, and faster: with few rows or outputs, Triton's is as fast."""
    return (
        x.is_cuda
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and x.dtype == torch.bfloat16
        and x.shape[0] > 16
        and weight.shape[0] >= 128 * _MULTIPROCESSORS
        and weight.shape[1] % 64 == 0
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
    )


def linear16(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """x [M, K], weight [N, K] to [M, N] in float32 or bfloat16."""
    (m, k), n = x.shape, weight.shape[0]
    tokens = next((count for count in _TOKENS if count >= m), _TOKENS[-1])
    groups = 2 if tokens <= 64 else 4
    tiles = -(-n // (64 * groups))
    if x.stride(-1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous()
    y = torch.empty(m, n, dtype=out_dtype, device=x.device)
    _kernel(tokens, groups, out_dtype == torch.float32, x.device).launch(
        (min(tiles, _MULTIPROCESSORS), 1, -(-m // tokens)),
        (
            tensor_map(x, tokens),
            tensor_map(weight, 64 * groups),
            pointer(bias),
            pointer(y),
            ctypes.c_int(m),
            ctypes.c_int(n),
            ctypes.c_int(k // 64),
            ctypes.c_int(tiles),
        ),
    )
    return y


@cache
def _kernel(tokens: int, groups: int, wide: bool, device: torch.device) -> Kernel:
    stages = min(8, (_SHARED_BYTES - 128) // (128 * (tokens + 64 * groups)))
    constants = {"TOKENS": tokens, "GROUPS": groups, "STAGES": stages, "WIDE": int(wide)}
    return Kernel("linear16.cu", "product16", constants, 128 * groups + 128, device)
