"""Rows on their way through a decoder in steps of random sizes, and adapters in a pool beside them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

from adaplex_adapters.reader import read_adapter
from adaplex_server.model.adapter_pool import AdapterPool, allocate_pool, write_adapter
from adaplex_server.model.base import Base
from adaplex_server.model.batch import NO_ADAPTER
from adaplex_server.model.batch_builder import RowInput
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.families import base_shape
from adaplex_server.model.kv_cache import KvCache
from support.tiny_models import CPU, PAGE_SIZE, allocate_kv, step


@dataclass
class Sequence:
    """A row on its way through steps of random sizes."""

    tokens: list[int]
    pages: list[int]
    slot: int = NO_ADAPTER
    done: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)

    def take(self, count: int) -> RowInput:
        part = self.tokens[self.done : self.done + count]
        return RowInput(part, self.done, self.pages, self.slot, len(part))


def sequences(lengths: list[int], slots: list[int], seed: int) -> list[Sequence]:
    """Rows with shuffled pages of a cache that has just enough."""
    rng = random.Random(seed)
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    pages = rng.sample(range(1, sum(counts) + 1), sum(counts))
    return [
        Sequence([rng.randrange(97) for _ in range(length)], [pages.pop() for _ in range(count)], slot)
        for length, count, slot in zip(lengths, counts, slots, strict=True)
    ]


def run(decoder: Decoder, kv: KvCache, rows: list[Sequence], seed: int) -> None:
    """Steps until all is done: rows begin and pause at random, some with a chunk, some with a single token."""
    rng = random.Random(seed)
    while any(row.done < len(row.tokens) for row in rows):
        live = [row for row in rows if row.done < len(row.tokens)]
        chosen = rng.sample(live, rng.randint(1, len(live)))
        parts = [row.take(rng.choice([1, 1, 2, 7, 40])) for row in chosen]
        for row, part, logits in zip(chosen, parts, step(decoder, kv, parts), strict=True):
            row.done += len(part.tokens)
            row.logits.append(logits)


def cache_for(base: Base, rows: list[Sequence]) -> KvCache:
    """Just enough."""
    return allocate_kv(base, 1 + sum(len(row.pages) for row in rows))


def pool_of(base: Base, folders: list[Path], pages: list[tuple[int, ...]]) -> AdapterPool:
    """The adapters of `folders`, each in its own slot and `pages`."""
    total = 1 + max(page for own in pages for page in own)
    pool = allocate_pool(base.config, total, len(folders), 4, torch.float32, CPU)
    for slot, (folder, own) in enumerate(zip(folders, pages, strict=True)):
        adapter = read_adapter(folder, base_shape(base.config))
        assert write_adapter(pool, base.config, slot, own, adapter) == 2 * len(adapter.modules)
    return pool
