"""A product of few rows with a 4-bit weight on Hopper (compute capability 9.0), in bfloat16: drives `linear4.cu`.

The same arithmetic as the Triton kernel (`kernels.gpu.linear4`), bit for bit: w = round(table[code] * scale), or
round((table[code] - zero) * scale), in bfloat16; float32 sums in the order of k, in steps of 16; the parts of K summed
by whoever finishes the linear. int4 is one more table of 16 values.

Faster because the weight goes from memory straight into the operands of the tensor core (`layout4`): a warp fetches it
with bulk copies, several steps ahead, and already before the launch in front has ended; a table of 256 pairs in shared
memory, one copy for each bank, turns a byte of codes into two values; expanding and multiplying overlap.

Limits: N and K as `fits` says; M in tiles of up to 128 rows.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from adaplex_server.kernels.cuda import layout4
from adaplex_server.kernels.cuda.launch import Kernel, pointer, tensor_map

if TYPE_CHECKING:
    from adaplex_server.kernels.gpu.linear4 import Kind, Packed4

_TOKENS = (8, 16, 24, 32, 48, 64, 96, 128)
_MULTIPROCESSORS = 132
"""Of the machine that shapes are cut for. A constant: the parts of K must not depend on where the weight is."""
_SHARED_BYTES = 227 << 10
_TABLE_BYTES = 64 << 10


class _Values(ctypes.Structure):
    _fields_ = (("of", ctypes.c_float * 16),)


@dataclass(frozen=True)
class Cut:
    """How a weight is divided. groups: of 64 outputs, to a block; parts: of K, which alone touch the order of sums."""

    groups: int
    parts: int


def choose_cut(n: int, k: int) -> Cut:
    """From the shape alone: parts until the machine is nearly full, and the largest blocks that use most of it."""
    blocks, steps = -(-n // layout4.BLOCK), layout4.steps(k)
    parts = 1
    while -(-blocks // 2) * parts < 0.85 * _MULTIPROCESSORS and parts < 8 and steps >= 4 * parts:
        parts *= 2

    def used(groups: int) -> float:
        rounds = -(-(-(-blocks // groups) * parts) // _MULTIPROCESSORS)
        return blocks * parts / (rounds * _MULTIPROCESSORS * groups)

    return Cut(max((1, 2, 3, 4), key=lambda groups: (round(used(groups), 2), groups)), parts)


def padded_blocks(n: int, k: int) -> int:
    """Blocks of 64 outputs that the layout of a weight has, so that every tile is whole."""
    groups = choose_cut(n, k).groups
    return -(-n // (layout4.BLOCK * groups)) * groups


def usable(device: torch.device, dtype: torch.dtype, k: int, group: int) -> bool:
    """Whether these kernels are for this device, activations' dtype, and weight."""
    hopper = device.type == "cuda" and torch.version.cuda is not None
    return (
        hopper
        and torch.cuda.get_device_capability(device) == (9, 0)
        and dtype == torch.bfloat16
        and layout4.fits(k, group)
    )


def product(x: torch.Tensor, weight: Packed4, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] bfloat16, M > 0, to the parts [S, M, N], as `kernels.gpu.linear4.product` says."""
    m, n = x.shape[0], weight.n
    cut = choose_cut(n, weight.k)
    tokens = next((count for count in _TOKENS if count >= m), _TOKENS[-1])
    steps, blocks = weight.words.shape[:2]
    kernel = _product_kernel(cut, tokens, -(-steps // cut.parts), weight.group, weight.zeros is not None, x.device)
    if x.stride(-1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous()
    parts = torch.empty(cut.parts, m, n, dtype=torch.bfloat16 if cut.parts == 1 else torch.float32, device=x.device)
    kernel.launch(
        (cut.parts, blocks // cut.groups, -(-m // tokens)),
        (
            tensor_map(x, tokens),
            pointer(weight.words),
            pointer(weight.scales),
            pointer(weight.zeros),
            _values(weight.kind),
            pointer(bias if cut.parts == 1 else None),
            pointer(parts),
            ctypes.c_int(m),
            ctypes.c_int(n),
            ctypes.c_int(steps),
            ctypes.c_int(blocks),
            ctypes.c_int(_span(weight)),
        ),
    )
    return parts


def dequantize(weight: Packed4) -> torch.Tensor:
    """The weight [N, K] bfloat16: the very values that `product` multiplies with."""
    steps, blocks = weight.words.shape[:2]
    out = torch.empty(weight.n, weight.k, dtype=torch.bfloat16, device=weight.words.device)
    constants = _constants(Cut(groups=4, parts=1), 8, 2, weight.group, weight.zeros is not None)
    kernel = _kernel("dequantize4", tuple(constants.items()), 128, out.device)
    tiles = 2 * steps * blocks
    kernel.launch(
        (min(tiles, 5 * _MULTIPROCESSORS), 1, 1),
        (
            pointer(weight.words),
            pointer(weight.scales),
            pointer(weight.zeros),
            _values(weight.kind),
            pointer(out),
            ctypes.c_int(weight.n),
            ctypes.c_int(weight.k),
            ctypes.c_int(blocks),
            ctypes.c_int(_span(weight)),
            ctypes.c_int(tiles),
        ),
    )
    return out


def _span(weight: Packed4) -> int:
    return max(1, weight.group // layout4.STEP)


@cache
def _values(kind: Kind) -> _Values:
    from adaplex_server.kernels.gpu.linear4 import table_values

    return _Values((ctypes.c_float * 16)(*table_values(kind)))


@cache
def _product_kernel(cut: Cut, tokens: int, steps: int, group: int, zeros: bool, device: torch.device) -> Kernel:
    """steps: of a part; no more are fetched ahead than there are."""
    scales = max(1, layout4.STEP // group) * 2 * layout4.BLOCK * (2 if zeros else 1)
    step_bytes = tokens * 2 * layout4.STEP + cut.groups * (layout4.BLOCK * layout4.STEP // 2 + scales)
    stages = min(8, max(2, steps), (_SHARED_BYTES - _TABLE_BYTES - 128) // step_bytes)
    constants = _constants(cut, tokens, stages, group, zeros)
    return _kernel("product4", tuple(constants.items()), 128 * cut.groups + 128, device)


def _constants(cut: Cut, tokens: int, stages: int, group: int, zeros: bool) -> dict[str, int]:
    return {
        "TOKENS": tokens,
        "GROUPS": cut.groups,
        "STAGES": stages,
        "DEPTH": 4 if tokens <= 64 else 2,
        "ZEROS": int(zeros),
        "GROUP": min(group, layout4.STEP),
        "ROUNDED": int(cut.parts == 1),
    }


@cache
def _kernel(name: str, constants: tuple[tuple[str, int], ...], threads: int, device: torch.device) -> Kernel:
    return Kernel("linear4.cu", name, dict(constants), threads, device)
