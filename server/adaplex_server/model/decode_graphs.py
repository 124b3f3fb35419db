"""Decode steps as CUDA graphs: one launch a step instead of hundreds, which is what a small batch waits for.

Owns the captured graphs, one for each `DecodeShape` that has come up, and their outputs. All that differs from step to
step (rows, adapters, pages, contexts) is data on the device, so that nothing is captured again when it changes; the
shape only fixes how many programs are launched, and those that find nothing to do end at once. A row's numbers do not
depend on the shape that served it.

A step begins with the tokens that the step before chose, and ends with its own, on the device: it can be launched
before the host knows either. Steps run one after another in one stream, so one buffer of tokens serves all of them.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from adaplex_server.kernels.feed import feed_tokens, likeliest
from adaplex_server.kernels.lora_tiles import tile_count
from adaplex_server.model.adapter_pool import RANK_PAGE, AdapterPool, with_rank
from adaplex_server.model.batch import NO_ADAPTER
from adaplex_server.model.decode_inputs import DecodeInputs, DecodeRows, DecodeShape
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.kv_cache import KvCache

_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_LEAST_CONTEXT = 1024
_MOST_POSITIONS = 1 << 21
"""Rows times context of a shape at most: attention keeps a partial sum for each of its chunks."""
_LEAST_RANK_PAGES = 2
_MOST_GRAPHS = 160
_SPARE_BYTES = 512 << 20
"""Free memory of the device below which nothing more is captured."""


@dataclass(frozen=True)
class Decoded:
    """Of each row: logits [R, vocab_size] float32, and best [R] int64, the likeliest token (the lowest of equals), or
    -1 where a logit is not finite. Views that the next step overwrites.
    """

    logits: torch.Tensor
    best: torch.Tensor


@dataclass(frozen=True)
class _Captured:
    inputs: DecodeInputs
    graph: torch.cuda.CUDAGraph


class DecodeGraphs:
    """The decoder's captured steps over its KV cache. max_rows: rows of a step at most. max_context: of a row.

    tokens: [max_rows] int64, what each place of the last step has chosen, always a token id: rows with a source are fed
    from it, and a step leaves its likeliest tokens there, in the places of all rows that its shape has.
    """

    def __init__(self, decoder: Decoder, kv: KvCache, max_rows: int, max_context: int, tokens: torch.Tensor) -> None:
        device = decoder.base.device
        self.replays = 0
        self._decoder = decoder
        self._kv = kv
        self._rows = _up_to(_ROWS, max_rows)
        self._contexts = _up_to(_powers_of_4(_LEAST_CONTEXT), max_context)
        self._rank_pages: tuple[int, ...] = ()
        if decoder.pool is not None:
            self._rank_pages = _up_to(_powers_of_4(_LEAST_RANK_PAGES), decoder.pool.slot_pages.shape[1])
        self._captured: OrderedDict[DecodeShape, _Captured] = OrderedDict()
        self._too_large: set[DecodeShape] = set()
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()
        self._logits = torch.empty(self._rows[-1], decoder.base.config.vocab_size, device=device)
        self._best = torch.empty(self._rows[-1], dtype=torch.int64, device=device)
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._captured)

    @property
    def max_rows(self) -> int:
        """Of a step."""
        return self._rows[-1]

    @torch.inference_mode()
    def run(self, rows: DecodeRows) -> Decoded | None:
        """One step; None if these rows fit no shape, the device has no memory to capture theirs, or one has an
        embedding or head of its own.
        """
        pool = self._decoder.pool
        if pool is not None:
            if pool.ends and any(slot in pool.ends for slot in rows.slots):
                return None
            rows = self._with_adapters(rows, pool)
        shape = self._shape_of(rows)
        captured = None if shape is None else self._obtain(shape)
        if captured is None:
            return None
        captured.inputs.fill(rows)
        captured.graph.replay()
        self.replays += 1
        count = len(rows.tokens)
        return Decoded(self._logits[:count], self._best[:count])

    @torch.inference_mode()
    def capture_common(self, seconds: float) -> None:
        """Capture what most steps need, the likeliest first, for about so long; the rest is captured when it comes."""
        end = time.monotonic() + seconds
        for shape in self._common():
            if time.monotonic() > end:
                return
            self._obtain(shape)

    def _common(self) -> Iterator[DecodeShape]:
        """Large ones before small ones, which then find room in the memory of the large."""
        for context in self._contexts[:2]:
            for variant in (0, -1, 1):
                for rows in reversed(self._rows):
                    tiles = (0, *_tile_counts(rows))[variant]
                    if rows * context <= _MOST_POSITIONS and (not tiles or self._rank_pages):
                        yield DecodeShape(rows, context, tiles, self._rank_pages[0] if tiles else 0)

    @staticmethod
    def _with_adapters(rows: DecodeRows, pool: AdapterPool) -> DecodeRows:
        """The rows with what their adapters are: those without rank rows have no part in the LoRA, and some have
        factors or bottlenecks.
        """
        factors: tuple[int, ...] = ()
        if pool.factor_rows:
            factors = tuple(pool.factor_rows.get(slot, -1) for slot in rows.slots)
        bottlenecks: tuple[int, ...] = ()
        if pool.bottlenecks:
            bottlenecks = tuple(slot if slot in pool.bottlenecks else NO_ADAPTER for slot in rows.slots)
        return replace(
            rows,
            slots=list(with_rank(rows.slots, pool.host_pages)),
            factors=factors if any(row >= 0 for row in factors) else (),
            bottlenecks=bottlenecks if any(slot >= 0 for slot in bottlenecks) else (),
        )

    def _shape_of(self, rows: DecodeRows) -> DecodeShape | None:
        count, context = len(rows.tokens), max(rows.positions) + 1
        if count > self._rows[-1] or context > self._contexts[-1]:
            return None
        bucket = _fitting(self._rows, count)
        context = _fitting(self._contexts, context)
        if bucket * context > _MOST_POSITIONS:
            return None
        used = {slot for slot in rows.slots if slot >= 0}
        beside = bool(rows.factors), self._bottleneck_pages(rows)
        if not used:
            return DecodeShape(bucket, context, 0, 0, *beside)
        assert self._decoder.pool is not None, "a row has an adapter where none is served"
        host_pages = self._decoder.pool.host_pages
        pages = max(len(host_pages[slot]) for slot in used)
        pages = _fitting(self._rank_pages, pages)
        for tiles in _tile_counts(bucket):
            shape = DecodeShape(bucket, context, tiles, pages, *beside)
            if tiles == bucket or tile_count(rows.slots, shape.tile_tokens) <= tiles:
                return shape
        raise AssertionError("each row is a tile at most")

    def _bottleneck_pages(self, rows: DecodeRows) -> int:
        if not rows.bottlenecks:
            return 0
        assert self._decoder.pool is not None, "a row has an adapter where none is served"
        own = self._decoder.pool.bottlenecks
        return _fitting(self._rank_pages, max(len(own[slot].weights) for slot in rows.bottlenecks if slot >= 0))

    def _obtain(self, shape: DecodeShape) -> _Captured | None:
        found = self._captured.get(shape)
        if found is not None:
            self._captured.move_to_end(shape)
            return found
        if shape in self._too_large:
            return None
        try:
            if torch.cuda.mem_get_info(self._logits.device)[0] < _SPARE_BYTES:
                raise torch.OutOfMemoryError
            found = self._captured[shape] = self._capture(shape)
        except torch.OutOfMemoryError:
            self._too_large.add(shape)
            return None
        if len(self._captured) > _MOST_GRAPHS:
            self._captured.popitem(last=False)
        return found

    def _capture(self, shape: DecodeShape) -> _Captured:
        """Nothing that a row owns is read or written: the inputs are padding."""
        inputs = DecodeInputs(shape, self._kv.page_size, self._logits.device)
        chosen = self._tokens.clone()
        # Kernels are compiled and loaded here, which a capture does not allow.
        self._step(inputs, shape)
        # The step in flight has chosen tokens that the next one is yet to be fed.
        self._tokens.copy_(chosen)
        torch.cuda.synchronize(self._logits.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Other threads may allocate pinned memory meanwhile.
            graph.capture_begin(self._memory, capture_error_mode="thread_local")
            try:
                self._step(inputs, shape)
            finally:
                graph.capture_end()
        return _Captured(inputs, graph)

    def _step(self, inputs: DecodeInputs, shape: DecodeShape) -> None:
        plan = self._decoder.lora_plan(inputs.tiles) if shape.tiles else None
        feed_tokens(inputs.batch.tokens, inputs.sources, self._tokens)
        bottlenecks = None
        if shape.bottleneck_pages:
            assert self._decoder.pool is not None, "a row has an adapter where none is served"
            bottlenecks = inputs.bottlenecks(self._decoder.pool.bottleneck_table, RANK_PAGE)
        logits = self._decoder.compute(inputs.batch, self._kv, plan, inputs.factors, bottlenecks)
        likeliest(logits, *(whole[: shape.rows] for whole in (self._logits, self._best, self._tokens)))


def _tile_counts(rows: int) -> tuple[int, ...]:
    """For few adapters among the rows, and for as many as rows."""
    return (rows * 3 // 8, rows) if rows >= 16 else (rows,)


def _powers_of_4(least: int) -> Iterator[int]:
    while True:
        yield least
        least *= 4


def _up_to(sizes: Iterator[int] | tuple[int, ...], most: int) -> tuple[int, ...]:
    """The rising sizes below `most`, and `most` itself, but no more than the sizes' last."""
    found: list[int] = []
    for size in sizes:
        found.append(min(size, most))
        if size >= most:
            break
    return tuple(found)


def _fitting(sizes: tuple[int, ...], needed: int) -> int:
    return next(size for size in sizes if size >= needed)
