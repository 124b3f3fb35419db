"""Soft prompts and prefixes in the decoder, beside a LoRA and the base in one batch, on every family."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from adaplex_adapters.spec import KIND_PREFIX_TUNING, KIND_PROMPT_TUNING, Adapter, draft
from adaplex_server.model.adapter_pool import allocate_pool, clear_slot, write_adapter
from adaplex_server.model.base import Base
from adaplex_server.model.batch_builder import RowInput
from adaplex_server.model.decoder import Decoder
from support import adapter_reference
from support.tiny_models import CPU, PAGE_SIZE, allocate_kv, load_tiny, save_tiny, step

FAMILIES = [
    "llama3",
    "mistral-window",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt_neox",
    "opt",
    "bloom",
    "gpt2",
]
VIRTUAL = 6


def soft(base: Base, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randn(VIRTUAL, base.config.hidden_size, generator=generator)
    return Adapter(draft(KIND_PROMPT_TUNING, "tiny"), soft_prompt=prompt)


def prefix(base: Base, seed: int) -> Adapter:
    config, generator = base.config, torch.Generator().manual_seed(seed)
    shape = (config.num_layers, 2, VIRTUAL, config.num_kv_heads, config.head_dim)
    return Adapter(draft(KIND_PREFIX_TUNING, "tiny"), prefix=torch.randn(shape, generator=generator))


def served(base: Base, adapters: list[Adapter], prompts: list[list[int]], rng: random.Random) -> list[torch.Tensor]:
    """Logits of every prompt token; row i has adapter i; in chunks of random sizes, side by side."""
    config = base.config
    pool = allocate_pool(config, 2, len(adapters), 1, torch.float32, CPU)
    for slot, adapter in enumerate(adapters):
        assert write_adapter(pool, config, slot, (), adapter) == 1
    decoder, kv = Decoder(base, pool), allocate_kv(base, 64)
    rows = [[-1 - i for i in range(VIRTUAL)] + prompt for prompt in prompts]
    pages = [list(range(1 + 16 * i, 17 + 16 * i)) for i in range(len(rows))]
    done, found = [0] * len(rows), [[] for _ in rows]
    while any(at < len(row) for at, row in zip(done, rows, strict=True)):
        batch = [(i, min(rng.randint(1, 7), len(row) - done[i])) for i, row in enumerate(rows) if done[i] < len(row)]
        inputs = [RowInput(rows[i][done[i] : done[i] + n], done[i], pages[i], i, n, virtual=VIRTUAL) for i, n in batch]
        for (i, n), logits in zip(batch, step(decoder, kv, inputs), strict=True):
            found[i].append(logits)
            done[i] += n
    return [torch.cat(parts)[VIRTUAL:] for parts in found]


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_are_what_the_adapter_alone_gives(kind: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, kind)
    base = load_tiny(tmp_path)
    adapters = [soft(base, 1), prefix(base, 2), soft(base, 3)]
    rng = random.Random(5)
    prompts = [[rng.randrange(97) for _ in range(length)] for length in (9, 14, 3)]
    for adapter, prompt, found in zip(adapters, prompts, served(base, adapters, prompts, rng), strict=True):
        expected = adapter_reference.logits(model, adapter, torch.tensor([prompt]))[0]
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
        plain = model(torch.tensor([prompt])).logits[0]
        assert not torch.allclose(plain, expected, atol=1e-2)


def test_a_cleared_slot_has_no_soft_prompt(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama3")
    base = load_tiny(tmp_path)
    pool = allocate_pool(base.config, 2, 1, 1, torch.float32, CPU)
    write_adapter(pool, base.config, 0, (), soft(base, 1))
    clear_slot(pool, 0)
    assert pool.soft == {}
    assert PAGE_SIZE < VIRTUAL, "the last page of virtual tokens must be shared with real ones"
