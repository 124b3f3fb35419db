"""Runs a decoder on made-up batches before the first request, so that no request waits for a kernel to be compiled.

Owns nothing: the keys and values go to pages of its own, which are given up again.
"""

from __future__ import annotations

from adaplex_server.model.batch_builder import RowInput, build_batch
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.kv_cache import KvCache

# One step for each size of tile that a kernel chooses by the number of tokens: up to 16, 32, 64, 128, and more.
_DECODE_ROWS = (1, 32, 64, 128)
_PROMPT_TOKENS = 160


def warm_up(decoder: Decoder, page_size: int, max_tokens: int) -> None:
    """Steps of the base alone, of at most max_tokens tokens. Kernels of adapters are compiled by the first adapter's
    proof.
    """
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
