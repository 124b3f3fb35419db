"""Bottlenecks beside a block, each token's own (Houlsby et al. 2019, Pfeiffer et al. 2020, He et al. 2021):

    block[t] := block[t] + scaling * (up act(down x[t] + down_bias) + up_bias)

in float32, where x is block, stream + block or stream, and stream is what the block's norm read. Where an adapter's
weights lie is said by `model.bottlenecks`. A token's sums follow an order that its own adapter fixes, and a token
without a bottleneck is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
}
"""By name; a place in this order is the activation's code."""
READS = ("none", "block", "sum", "stream")
"""What x is, by code; "none" where the adapter has no bottleneck at this place."""
BIAS_ROW, CODE_ROW, SCALING_ROW = 0, 2, 2
"""Rows of a page of vectors: of `down` the bias (two rows, to be added), then the codes of activation and x; of `up`
the bias (two rows), then the scaling (two rows).
"""
# A BLAS sums in another way for few rows (`kernels.dense`).
_PADDING = 8


@dataclass(frozen=True)
class BottleneckSpan:
    """Tokens [begin, end) are of an adapter with these pages of weights, in order, and this page of vectors."""

    begin: int
    end: int
    pages: tuple[int, ...]
    vectors: int


@dataclass(frozen=True)
class BottleneckPlan:
    """slots: [T] int32, the slot of each token with bottlenecks, negative for none. table: [S, 2 + Q] int32: a slot's
    page of vectors, how many pages of weights it has, and these. most_pages: of weights, of any slot here. page_rows:
    pool rows of a page. spans: the same on the host; empty where only the device knows.
    """

    slots: torch.Tensor
    table: torch.Tensor
    most_pages: int
    page_rows: int
    spans: tuple[BottleneckSpan, ...]


def add_bottlenecks(
    stream: torch.Tensor, block: torch.Tensor, down: torch.Tensor, up: torch.Tensor, plan: BottleneckPlan
) -> None:
    """block [T, H] with its tokens' bottlenecks added, in place. stream: [T, H]; down: [pool rows, G, H], of which
    target 0 is read; up: [pool rows, H].
    """
    if block.is_cuda:
        from adaplex_server.kernels.gpu import bottleneck as gpu

        gpu.add_bottlenecks(stream, block, down, up, plan)
        return
    for span in plan.spans:
        own = slice(span.begin, span.end)
        block[own] += bottleneck(stream[own], block[own], down, up, span, plan.page_rows).to(block.dtype)


def bottleneck(
    stream: torch.Tensor,
    block: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    span: BottleneckSpan,
    page_rows: int,
) -> torch.Tensor:
    """What is added to block [t, H] for the tokens of a span: [t, H] float32. On the CPU."""
    first = span.vectors * page_rows
    activation, reads = (int(code) for code in down[first + CODE_ROW, 0, :2])
    if READS[reads] == "none":
        return torch.zeros_like(block, dtype=torch.float32)
    s, h = stream.float(), block.float()
    x = {"block": h, "sum": s + h, "stream": s}[READS[reads]]
    count = x.shape[0]
    x = F.pad(x, (0, 0, 0, -count % _PADDING))
    rows = torch.tensor([page * page_rows + i for page in span.pages for i in range(page_rows)])
    bias = down[first + BIAS_ROW : first + BIAS_ROW + 2, 0, : len(rows)].float().sum(0)
    inner = F.linear(x, down[rows, 0].float()) + bias
    function = list(ACTIVATIONS.values())[activation]
    out = torch.mm(function(inner), up[rows].float())[:count]
    out += up[first + BIAS_ROW : first + BIAS_ROW + 2].float().sum(0)
    return out * up[first + SCALING_ROW : first + SCALING_ROW + 2].float().sum(0)
