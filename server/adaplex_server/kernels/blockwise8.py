"""The 8-bit dynamic code in which double quantization keeps the absmax of NF4 blocks.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861); the rounding follows the
CPU code of bitsandbytes 0.50 bit for bit: a value is first rounded to one of 65536 steps over [-1, 1], and the step
decides the code. The same rule is used on every device, so that a base has the same bits wherever it was quantized
(bitsandbytes' CUDA code picks the neighbour in about 1 of 700 values).
"""

from __future__ import annotations

from functools import cache

import torch

GROUP = 256
_STEPS = 65536
_CHUNK = 1 << 22


@cache
def dynamic_code(device: torch.device) -> torch.Tensor:
    """The 256 values of the code in ascending order, float32 on `device`; callers never write to it.

    Seven decades, each with twice as many values as the one below it (the midpoints of equal intervals of [0.1, 1]
    times the decade), both signs, zero, and 1.
    """
    values: list[float] = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = (bounds[:-1] + bounds[1:]) / 2.0
        values += (10 ** (decade - 6) * means).tolist()
        values += (-(10 ** (decade - 6)) * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def _code_of_step(device: torch.device) -> torch.Tensor:
    """[65536] uint8: the code nearest to each step, the lower one of two equally near."""
    code = dynamic_code(device)
    steps = -1.0 + (2.0 * torch.arange(_STEPS, dtype=torch.float32, device=device)) / (_STEPS - 1)
    return torch.bucketize(steps, 0.5 * (code[:-1] + code[1:])).to(torch.uint8)


def quantize_dynamic8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values: [n] float32. Returns codes [n] uint8 and scales [ceil(n / 256)] float32, the largest magnitude of each
    group.
    """
    codes = torch.empty(values.numel(), dtype=torch.uint8, device=values.device)
    scales = torch.empty(-(-values.numel() // GROUP), dtype=torch.float32, device=values.device)
    table = _code_of_step(values.device)
    for begin in range(0, values.numel(), _CHUNK):
        piece = values[begin : begin + _CHUNK]
        groups = torch.nn.functional.pad(piece, (0, -piece.numel() % GROUP)).view(-1, GROUP)
        largest = groups.abs().amax(dim=1, keepdim=True)
        normal = (groups * (1.0 / largest)).clamp_(-1, 1).add_(1).mul_(0.5).mul_(_STEPS - 1).add_(0.5)
        found = table[normal.nan_to_num_(0.0).to(torch.int64)]  # a group of zeros divides by zero: code 0
        codes[begin : begin + _CHUNK] = found.where(largest > 0, 0).view(-1)[: piece.numel()]
        scales[begin // GROUP : begin // GROUP + len(largest)] = largest.view(-1)
    return codes, scales
