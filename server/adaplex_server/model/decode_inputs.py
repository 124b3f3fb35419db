"""What a captured decode step reads of its batch: device memory that stays where it is, filled by one copy a step.

A step has as many rows as its shape allows; those beyond the batch are padding: one visible position, which is page
0's zeros, no adapter, and a negative place for their key and value, which the kernels do not write.

The pinned memory may be filled for a step while the step before runs: the copy waits in the stream, and `fill` for the
step after waits until that copy has been made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from adaplex_server.kernels.bottleneck import BottleneckPlan
from adaplex_server.kernels.factors import FactorPlan
from adaplex_server.kernels.lora_tiles import FEW_TILE, FEW_TOKENS, SMALL_TILE, LoraTiles, decode_tiles
from adaplex_server.model.batch import NO_ADAPTER, StepBatch

GIVEN = -1
"""The source of a row whose token the host gives."""


@dataclass(frozen=True)
class DecodeRows:
    """Rows that compute one token each. Of each row: the token, its position, the row's KV pages (at least those up to
    that position; the same list until it stands for other pages, but for new ones at its end), its adapter slot or
    NO_ADAPTER, and the source of its token: GIVEN, or its place in the step before, which chooses it (`tokens` is then
    unused). No sources: all are given. factors: the first pool row of each row's factors, -1 for none; bottlenecks: the
    slot of each row that has some, else -1; empty where no row has any.
    """

    tokens: list[int]
    positions: list[int]
    pages: list[list[int]]
    slots: list[int]
    sources: Sequence[int] = ()
    factors: Sequence[int] = ()
    bottlenecks: Sequence[int] = ()


@dataclass(frozen=True)
class DecodeShape:
    """The most that a captured step serves. rows; context: positions of a row; tiles: of tokens that share an adapter,
    0 for the base alone, as many as rows where each row is a tile; rank_pages: of an adapter; factors: whether rows may
    have some; bottleneck_pages: of the weights of an adapter's bottlenecks, 0 where no row may have any.
    """

    rows: int
    context: int
    tiles: int
    rank_pages: int
    factors: bool = False
    bottleneck_pages: int = 0

    @property
    def tile_tokens(self) -> int:
        """Of a tile at most."""
        if self.rows > FEW_TOKENS:
            return SMALL_TILE
        return FEW_TILE if self.tiles < self.rows else 1


@dataclass(frozen=True)
class _Parts:
    """Views of one int64 buffer: the first three [R] int64, the others int32 as in `StepBatch` and `LoraTiles`.
    sources, factors, bottlenecks: [R], as in `DecodeRows`.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    contexts: torch.Tensor
    sources: torch.Tensor
    factors: torch.Tensor
    bottlenecks: torch.Tensor
    slots: torch.Tensor
    order: torch.Tensor
    tiles: torch.Tensor
    table: torch.Tensor

    @staticmethod
    def length(shape: DecodeShape, width: int) -> int:
        """Of the buffer, in int64."""
        return 3 * shape.rows + -(-((6 + width) * shape.rows + 3 * shape.tiles) // 2)

    @staticmethod
    def of(buffer: torch.Tensor, shape: DecodeShape, width: int) -> _Parts:
        rows, tiles = shape.rows, 3 * shape.tiles
        sizes = [rows, rows, rows, rows, rows, rows, tiles, rows * width]
        narrow = buffer[3 * rows :].view(torch.int32)[: sum(sizes)].split(sizes)
        contexts, sources, factors, bottlenecks, slots, order, tile, table = narrow
        tokens, positions, kv_slots = buffer[: 3 * rows].split(rows)
        return _Parts(
            tokens,
            positions,
            kv_slots,
            contexts,
            sources,
            factors,
            bottlenecks,
            slots,
            order,
            tile.view(-1, 3),
            table.view(rows, width),
        )


class DecodeInputs:
    """Owns one shape's pinned memory and device memory. `batch`, `tiles`, `factors`, `sources`: views of the latter."""

    def __init__(self, shape: DecodeShape, page_size: int, device: torch.device) -> None:
        rows, width = shape.rows, -(-shape.context // page_size)
        self._page_size = page_size
        on_gpu = device.type == "cuda"
        self._pinned = torch.zeros(_Parts.length(shape, width), dtype=torch.int64, pin_memory=on_gpu)
        self._device = torch.zeros_like(self._pinned, device=device)
        self._copied = torch.cuda.Event() if on_gpu else None
        host = _Parts.of(self._pinned, shape, width)
        self._host = {part.name: getattr(host, part.name).numpy() for part in fields(_Parts)}
        # Of each row the list whose pages are in the table, and how many of them.
        self._pages: list[list[int] | None] = [None] * rows
        self._counts = [0] * rows
        self._slots: list[int] | None = None
        self._used = rows
        self._every = np.arange(rows)
        parts = _Parts.of(self._device, shape, width)
        self.batch = _batch(parts, shape)
        self.sources = parts.sources
        self.factors = FactorPlan(parts.factors, ()) if shape.factors else None
        self._bottlenecks = parts.bottlenecks
        self._shape = shape
        slots = parts.slots if shape.rows <= FEW_TOKENS else None
        self.tiles = LoraTiles(parts.order, parts.tiles, shape.tile_tokens, shape.rank_pages, slots)
        self.fill(DecodeRows([], [], [], []))

    def fill(self, rows: DecodeRows) -> None:
        """Bring these rows to the device, in the current stream's order."""
        if self._copied is not None:
            self._copied.synchronize()
        host, count, size = self._host, len(rows.tokens), self._page_size
        host["tokens"][:count] = rows.tokens
        positions = np.array(rows.positions, dtype=np.int64)
        host["positions"][:count] = positions
        host["contexts"][:count] = positions + 1
        host["sources"][:count] = rows.sources or GIVEN
        host["factors"][:count] = rows.factors or -1
        host["bottlenecks"][:count] = rows.bottlenecks or -1
        table = host["table"]
        for row, pages in enumerate(rows.pages):
            if pages is not self._pages[row] or len(pages) != self._counts[row]:
                self._place_pages(row, pages)
        page, offset = np.divmod(positions, size)
        host["kv_slots"][:count] = table[self._every[:count], page].astype(np.int64) * size + offset
        self._pad(count)
        if rows.slots != self._slots:
            self._place_adapters(rows.slots)
        self._device.copy_(self._pinned, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def bottlenecks(self, table: torch.Tensor, page_rows: int) -> BottleneckPlan | None:
        """The plan of the shape's rows; table: the pool's, on the device."""
        if not self._shape.bottleneck_pages:
            return None
        return BottleneckPlan(self._bottlenecks, table, self._shape.bottleneck_pages, page_rows, ())

    def _place_pages(self, row: int, pages: list[int]) -> None:
        first = self._counts[row] if pages is self._pages[row] else 0
        line = self._host["table"][row]
        fitting = pages[first : len(line)]
        line[first : first + len(fitting)] = fitting
        self._pages[row], self._counts[row] = pages, len(pages)

    def _pad(self, count: int) -> None:
        """Rows from `count` on that the last batch used."""
        host, rest = self._host, slice(count, self._used)
        self._used = count
        host["tokens"][rest] = host["positions"][rest] = 0
        host["sources"][rest] = GIVEN
        host["factors"][rest] = host["bottlenecks"][rest] = -1
        host["kv_slots"][rest] = -1
        host["contexts"][rest] = 1
        host["table"][rest, 0] = 0
        for row in range(rest.start, rest.stop):
            self._pages[row] = None

    def _place_adapters(self, slots: list[int]) -> None:
        host = self._host
        host["slots"][:] = NO_ADAPTER
        host["slots"][: len(slots)] = slots
        if len(host["tiles"]):
            order, tiles = decode_tiles(slots, self._shape.tile_tokens)
            host["order"][: len(order)] = order
            host["tiles"][:] = 0
            host["tiles"][: len(tiles)] = tiles
        self._slots = list(slots)


def _batch(parts: _Parts, shape: DecodeShape) -> StepBatch:
    """Its lists on the host say the most that any batch has: they fix the launches."""
    rows = torch.arange(shape.rows + 1, dtype=torch.int32, device=parts.tokens.device)
    return StepBatch(
        tokens=parts.tokens,
        positions=parts.positions,
        kv_slots=parts.kv_slots,
        token_start=rows,
        context_lens=parts.contexts,
        page_table=parts.table,
        logit_tokens=rows[:-1].long(),
        row_tokens=(1,) * shape.rows,
        row_contexts=(shape.context,) * shape.rows,
        row_slots=(NO_ADAPTER,) * shape.rows,
    )
