"""Bottlenecks as pages of an adapter's image.

Every linear of the pool has rank rows, and two of a block have the features of the residual stream: the first linear's
inputs and the last one's outputs. So a bottleneck of width m lies in ceil(m / RANK_PAGE) pages of the pool: row i of
`down` as row i of a of the block's first linear (target 0), row i of `up`, transposed, as row i of b of its last. One
page more holds the vectors and codes (`kernels.bottleneck` says in which rows); what a vector loses by rounding to the
pool's dtype stands in the row after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.spec import Adapter, Bottleneck
from adaplex_server.kernels.bottleneck import (
    ACTIVATIONS,
    BIAS_ROW,
    CODE_ROW,
    READS,
    SCALING_ROW,
    BottleneckPlan,
    BottleneckSpan,
)
from adaplex_server.model.config import ModelConfig
from adaplex_server.model.families import FAMILIES
from adaplex_server.model.upload import upload

Page = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Of each linear a [layers, RANK_PAGE, G, K] and b [layers, RANK_PAGE, N] of one page."""
TABLE_HEAD = 2
"""Columns of a slot's line in the table before its pages of weights (`BottleneckPlan`)."""


@dataclass(frozen=True)
class BottleneckPages:
    """A slot's pages in the pool: of weights, in order, and of vectors."""

    weights: tuple[int, ...]
    vectors: int


def linears_of(config: ModelConfig, place: str) -> tuple[str, str]:
    """The first and the last linear of a block ("attention" or "mlp")."""
    if place == "attention":
        return "qkv", "o"
    return ("gate_up" if FAMILIES[config.family].gated else "up"), "down"


def refuse_bottlenecks(adapter: Adapter, config: ModelConfig, page_rows: int) -> None:
    """Raise InvalidAdapter if a bottleneck has no place in this base's layers."""
    if not adapter.bottlenecks:
        return
    if config.parallel_residual:
        raise InvalidAdapter(
            f"bottlenecks cannot be served on {config.name}: its attention and MLP stand side by side, and a "
            "bottleneck stands after a block; train a LoRA for this base"
        )
    normed = "after_attention" in FAMILIES[config.family].norms
    for (layer, place), one in adapter.bottlenecks.items():
        where, width = f"layer {layer}'s {place} bottleneck", one.down.shape[0]
        if normed and one.reads != "block":
            raise InvalidAdapter(
                f"{where} reads the {one.reads}, which is not served on {config.name}, whose blocks end in a norm; "
                "one that reads the block is"
            )
        if math.ceil(width / page_rows) * page_rows > config.hidden_size:
            raise InvalidAdapter(f"{where} is {width} wide; widths up to the {config.hidden_size} features are served")


def weight_pages(adapter: Adapter, page_rows: int) -> int:
    """Pages that the weights of the widest bottleneck take, 0 without any."""
    return math.ceil(max((one.down.shape[0] for one in adapter.bottlenecks.values()), default=0) / page_rows)


def place_bottlenecks(adapter: Adapter, config: ModelConfig, pages: Sequence[Page]) -> int:
    """Put the bottlenecks into pages of zeros, of vectors the last. Returns how many tensors of the adapter have found
    their place.
    """
    *weights, vectors = pages
    for (layer, place), one in adapter.bottlenecks.items():
        first, last = linears_of(config, place)
        width = one.down.shape[0]
        for index, page in enumerate(weights):
            down, up = page[first][0][layer, :, 0], page[last][1][layer]
            begin = index * len(down)
            count = min(max(width - begin, 0), len(down))
            down[:count] = one.down[begin : begin + count]
            up[:count] = one.up[:, begin : begin + count].T
        _place_vectors(one, vectors[first][0][layer, :, 0], vectors[last][1][layer])
    return 5 * len(adapter.bottlenecks)


def _place_vectors(one: Bottleneck, down: torch.Tensor, up: torch.Tensor) -> None:
    width = one.down.shape[0]
    _split(one.down_bias, down[BIAS_ROW:, :width])
    _split(one.up_bias, up[BIAS_ROW:])
    _split(one.scaling.expand(up.shape[1]), up[SCALING_ROW:])
    down[CODE_ROW, 0] = list(ACTIVATIONS).index(one.activation)
    down[CODE_ROW, 1] = READS.index(one.reads)


def _split(values: torch.Tensor, rows: torch.Tensor) -> None:
    rows[0] = values
    rows[1] = values.float() - rows[0].float()


def table_line(pages: BottleneckPages, columns: int) -> list[int]:
    """A slot's line in the table, of so many columns."""
    line = [pages.vectors, len(pages.weights), *pages.weights]
    return line + [0] * (columns - len(line))


def plan_bottlenecks(
    row_tokens: Sequence[int],
    row_slots: Sequence[int],
    slots: Mapping[int, BottleneckPages],
    table: torch.Tensor,
    page_rows: int,
) -> BottleneckPlan | None:
    """For the rows of a step; None when none has bottlenecks. slots: those that hold some; table: on the device."""
    if not slots:
        return None
    spans: list[BottleneckSpan] = []
    index: list[int] = []
    for count, slot in zip(row_tokens, row_slots, strict=True):
        own = slots.get(slot)
        if own is not None and count:
            spans.append(BottleneckSpan(len(index), len(index) + count, own.weights, own.vectors))
        index += [-1 if own is None else slot] * count
    if not spans:
        return None
    most = max(len(span.pages) for span in spans)
    return BottleneckPlan(upload(index, torch.int32, table.device), table, most, page_rows, tuple(spans))
