"""How a 4-bit weight lies in memory for the kernels of `linear4.cu`, in plain torch.

K is padded to steps of 128 k and N to blocks of 64 outputs. A warpgroup takes the codes of a block and step in one
piece of 4096 bytes, in which each of its 128 threads finds its own operands of the tensor core's m64k16 product (PTX
ISA, "Register Fragments for wgmma.mma_async.m64nNk16"): thread 32 * w + 4 * g + q owns, of a block, outputs 16 * w + g
and that + 8, and of each 16 k the pairs 2 * q and 2 * q + 8.

words [K / 128, N / 64, 1024] int32: [2 (64 k), 128 (threads), 4 (16 k)] words of four bytes; byte 2 * h + r holds the
codes of the pair 2 * q + 8 * h of output 16 * w + g + 8 * r, the even k in its lower half.
scales, zeros [K / (128 * span), N / 64, 128 / group, 64]: `span` steps share a row where a group is longer than a step.
The 64 values go w, g, r, so that a thread finds both of its outputs' in one word.
"""

from __future__ import annotations

import torch

STEP = 128
BLOCK = 64
_ROWS_AT_A_TIME = 4096


def fits(k: int, group: int) -> bool:
    """Whether groups of `group` in-features lie well. K itself is one group."""
    return k % 8 == 0 and (group >= k or group in (32, 64) or group % STEP == 0)


def steps(k: int) -> int:
    """Steps of a weight with k in-features."""
    return -(-k // STEP)


def padded_group(k: int, group: int) -> int:
    """The group's length in the layout."""
    return steps(k) * STEP if group >= k else group


def pack_words(codes: torch.Tensor, blocks: int) -> torch.Tensor:
    """codes: [N, K] uint8 below 16, N <= 64 * blocks. Returns [K / 128, blocks, 1024] int32."""
    n, k = codes.shape
    codes = torch.nn.functional.pad(codes, (0, steps(k) * STEP - k, 0, blocks * BLOCK - n))
    words = torch.empty(steps(k), blocks, 8 * STEP, dtype=torch.int32, device=codes.device)
    for begin in range(0, blocks * BLOCK, _ROWS_AT_A_TIME):
        some = codes[begin : begin + _ROWS_AT_A_TIME]
        words[:, begin // BLOCK : (begin + len(some)) // BLOCK] = _words(some)
    return words


def _words(codes: torch.Tensor) -> torch.Tensor:
    n, k = codes.shape
    # [blocks, w, r, g] outputs and [steps, 64 k, 16 k, h, q, odd] in-features.
    split = codes.view(n // BLOCK, 4, 2, 8, k // STEP, 2, 4, 2, 4, 2).permute(4, 0, 5, 1, 3, 8, 6, 7, 2, 9)
    words = torch.zeros(split.shape[:7], dtype=torch.int32, device=codes.device)
    for byte in range(4):
        for odd in range(2):
            words |= split[..., byte // 2, byte % 2, odd].to(torch.int32) << (8 * byte + 4 * odd)
    return words.reshape(k // STEP, n // BLOCK, 8 * STEP)


def unpack_words(words: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """[N, K] uint8, the inverse of `pack_words`."""
    many, blocks, _ = words.shape
    split = words.view(many, blocks, 2, 4, 8, 4, 4)
    codes = torch.empty(blocks, 4, 2, 8, many, 2, 4, 2, 4, 2, dtype=torch.uint8, device=words.device)
    places = codes.permute(4, 0, 5, 1, 3, 8, 6, 7, 2, 9)
    for byte in range(4):
        for odd in range(2):
            places[..., byte // 2, byte % 2, odd] = ((split >> (8 * byte + 4 * odd)) & 15).to(torch.uint8)
    return codes.view(blocks * BLOCK, many * STEP)[:n, :k].contiguous()


def pack_groups(values: torch.Tensor, k: int, group: int, blocks: int) -> torch.Tensor:
    """values: [N, ceil(K / group)], scales or zeros, to [K / (128 * span), blocks, 128 / group, 64] in their dtype,
    zero where the weight is padded. group: `padded_group`.
    """
    n, groups = values.shape
    padded = -(-steps(k) * STEP // group)
    values = torch.nn.functional.pad(values, (0, padded - groups, 0, blocks * BLOCK - n))
    together = max(1, STEP // group)
    split = values.view(blocks, 4, 2, 8, padded // together, together).permute(4, 0, 5, 1, 3, 2)
    return split.reshape(padded // together, blocks, together, BLOCK)
