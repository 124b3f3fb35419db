"""Runs a decoder on made-up batches before the first request, so that no request waits for a kernel to be compiled.

Owns nothing: the keys and values go to pages of its own, which are given up again.
"""

from __future__ import annotations

from itertools import product

import torch

from adaplex_server.kernels.bottleneck import BottleneckPlan
from adaplex_server.kernels.lora_tiles import FEW_TILE, FEW_TOKENS, LARGE_TILE, NO_SLOT, SMALL_TILE, LoraTiles
from adaplex_server.model.adapter_image import RANK_PAGE
from adaplex_server.model.batch_builder import RowInput, build_batch
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.kv_cache import KvCache

# One step for each size of tile that a kernel chooses by the number of tokens.
_DECODE_ROWS = (1, 16, 24, 32, 48, 64, 96, 128)
_PROMPT_TOKENS = 160


def warm_up(decoder: Decoder, page_size: int, max_tokens: int) -> None:
    """Steps of at most max_tokens tokens, of the base alone and then as if some had adapters."""
    base = decoder.base
    config = base.config
    prompt = min(_PROMPT_TOKENS, max_tokens, config.max_context)
    pages = list(range(1, 1 + -(-prompt // page_size)))
    kv = KvCache.allocate(
        config.num_layers,
        1 + len(pages),
        page_size,
        config.num_kv_heads,
        config.head_dim,
        base.dtype,
        base.device,
    )
    steps = [[RowInput([0], 0, pages[:1])] * rows for rows in _DECODE_ROWS if rows <= max_tokens]
    for rows in (*steps, [RowInput([0] * prompt, 0, pages)]):
        decoder.forward(build_batch(rows, page_size, base.device), kv)
    if decoder.pool is not None and base.device.type == "cuda":
        few = build_batch(steps[0], page_size, base.device)
        most = decoder.pool.slot_pages.shape[1]
        for tile_tokens, rank_pages in product((1, FEW_TILE), {1, most}):
            decoder.compute(few, kv, decoder.lora_plan(_empty_tile(tile_tokens, rank_pages, 1, base.device)))
        nobody = torch.full((1,), NO_SLOT, dtype=torch.int32, device=base.device)
        plan = BottleneckPlan(nobody, decoder.pool.bottleneck_table, 1, RANK_PAGE, ())
        decoder.compute(few, kv, None, bottlenecks=plan)
        if prompt > FEW_TOKENS:
            many = build_batch([RowInput([0] * prompt, 0, pages)], page_size, base.device)
            for tile_tokens, rank_pages in product((SMALL_TILE, LARGE_TILE), {1, most}):
                decoder.compute(many, kv, decoder.lora_plan(_empty_tile(tile_tokens, rank_pages, None, base.device)))


def _empty_tile(tile_tokens: int, max_pages: int, tokens: int | None, device: torch.device) -> LoraTiles:
    """Launches the kernels of adapters, which find nothing to do. tokens: of a step of few, else None."""
    order, tiles = torch.zeros(4, dtype=torch.int32, device=device).split([1, 3])
    slots = None if tokens is None else torch.full((tokens,), NO_SLOT, dtype=torch.int32, device=device)
    return LoraTiles(order, tiles.view(1, 3), tile_tokens, max_pages, slots)
