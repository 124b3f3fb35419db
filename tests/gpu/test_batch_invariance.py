"""Steps of at most FEW_TOKENS: a row's logits are bit for bit the same alone or mixed, in chunks of any size, decoded
or computed again, with its adapter. The engine's `batch_invariant` keeps to such steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from adaplex_server.kernels.lora_tiles import FEW_TOKENS
from adaplex_server.model.adapter_pool import RANK_PAGE, AdapterPool, allocate_pool
from adaplex_server.model.batch_builder import RowInput, build_batch
from adaplex_server.model.config import parse_config
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.kv_cache import KvCache
from adaplex_server.model.random_base import random_base

CUDA = torch.device("cuda")
PAGE, LENGTH, SLOTS = 16, 300, 5
PAGES = -(-LENGTH // PAGE)
TOKENS = [(31 * at + 7) % 997 for at in range(LENGTH)]


@pytest.fixture(params=["gptq", "nf4", "none"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """Two layers as wide as an 8B base's, with five adapters of ranks 8 to 40."""
    shape = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 1000,
        "max_position_embeddings": 1024,
        "eos_token_id": 2,
    }
    config = parse_config(shape, {}, "wide")
    pool = allocate_pool(config, 1 + SLOTS * SLOTS, SLOTS, SLOTS, torch.bfloat16, CUDA)
    _fill(pool)
    return Decoder(random_base(config, request.param, dtype=torch.bfloat16, device=CUDA), pool)


def _fill(pool: AdapterPool) -> None:
    for linear in pool.linears.values():
        linear.a[:, RANK_PAGE:].normal_(0, 0.02)
        linear.b[:, RANK_PAGE:].normal_(0, 0.02)
        linear.scaling.fill_(2.0)
    for slot in range(SLOTS):
        own = tuple(1 + slot * SLOTS + i for i in range(slot + 1))
        pool.slot_pages[slot, : len(own)] = torch.tensor(own, dtype=torch.int32)
        pool.slot_page_count[slot] = len(own)
        pool.host_pages[slot] = own


def own_logits(decoder: Decoder, chunks: Sequence[tuple[int, int]], neighbours: int, slot: int) -> torch.Tensor:
    """Of every token of one row, computed in these chunks [begin, end), each in a step with so many other rows."""
    config = decoder.base.config
    kv = KvCache.allocate(
        config.num_layers, 2 + PAGES, PAGE, config.num_kv_heads, config.head_dim, torch.bfloat16, CUDA
    )
    pages, found = list(range(2, 2 + PAGES)), []
    for begin, end in chunks:
        count = end - begin
        own = RowInput(TOKENS[begin:end], begin, pages, slot, count)
        others = [RowInput([at], 0, [1], at % (SLOTS + 1) - 1, 1) for at in range(min(neighbours, FEW_TOKENS - count))]
        before = others[: len(others) // 2]
        batch = build_batch([*before, own, *others[len(before) :]], PAGE, CUDA)
        found.append(decoder.forward(batch, kv)[len(before) : len(before) + count])
    return torch.cat(found)


@pytest.mark.parametrize("slot", [-1, 1, 4])
def test_a_row_has_its_own_bits(decoder: Decoder, slot: int) -> None:
    alone = own_logits(decoder, [(0, 128), (128, 256), (256, LENGTH)], 0, slot)
    assert torch.isfinite(alone).all()
    again = own_logits(decoder, [(0, 100), (100, 101), (101, 229), (229, LENGTH)], 0, slot)
    assert torch.equal(again, alone), "chunks"
    mixed = own_logits(decoder, [(0, 70), (70, 128), (128, 255), (255, LENGTH)], 64, slot)
    assert torch.equal(mixed, alone), "neighbours"
    decoded = own_logits(
        decoder, [(0, 128), (128, 250), *((at, at + 1) for at in range(250, 270)), (270, LENGTH)], 33, slot
    )
    assert torch.equal(decoded, alone), "decoded"
