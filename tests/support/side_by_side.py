"""Adapters of every kind for a tiny base, and the decoder with all of them in one batch, in chunks of random sizes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from adaplex_adapters.spec import KIND_DORA, KIND_IA3, KIND_LORA, KIND_PROMPT_TUNING, Adapter, LoraModule, Scale, draft
from adaplex_server.model.adapter_image import page_count
from adaplex_server.model.adapter_pool import allocate_pool, write_adapter
from adaplex_server.model.base import Base
from adaplex_server.model.batch import NO_ADAPTER
from adaplex_server.model.batch_builder import RowInput
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.families import base_shape, module_paths
from support.tiny_models import CPU, PAGE_SIZE, allocate_kv, step

_PAGES = 64
_SLOT_PAGES = 8
_ROW_PAGES = 12


def lora(base: Base, rank: int, seed: int) -> Adapter:
    """A LoRA of all linears."""
    return Adapter(draft(KIND_LORA, "tiny"), modules=_modules(base, rank, seed, dora=False))


def dora(base: Base, rank: int, seed: int) -> Adapter:
    """A DoRA of all linears."""
    return Adapter(draft(KIND_DORA, "tiny"), modules=_modules(base, rank, seed, dora=True))


def _modules(base: Base, rank: int, seed: int, *, dora: bool) -> dict[str, LoraModule]:
    generator, modules = torch.Generator().manual_seed(seed), {}
    for path, shape in base_shape(base.config).linears.items():
        a = torch.randn(rank, shape.in_features, generator=generator) * 0.2
        b = torch.randn(shape.out_features, rank, generator=generator) * 0.2
        magnitude = torch.rand(shape.out_features, generator=generator) * 4 if dora else None
        modules[path] = LoraModule(a, b, 0.75, magnitude)
    return modules


def ia3(base: Base, seed: int) -> Adapter:
    """Factors on the outputs of the values and on what goes into "down"."""
    generator, scales = torch.Generator().manual_seed(seed), {}
    linears = base_shape(base.config).linears
    for layer in range(base.config.num_layers):
        values = module_paths(base.config, layer, "qkv")[-1]
        scales[values] = Scale(torch.randn(linears[values].out_features, generator=generator), "output")
        down = module_paths(base.config, layer, "down")[0]
        scales[down] = Scale(torch.randn(linears[down].in_features, generator=generator), "input")
    return Adapter(draft(KIND_IA3, "tiny"), scales=scales)


def soft_prompt(base: Base, count: int, seed: int) -> Adapter:
    """So many virtual tokens."""
    prompt = torch.randn(count, base.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return Adapter(draft(KIND_PROMPT_TUNING, "tiny"), soft_prompt=prompt)


def logits(
    base: Base, adapters: Sequence[Adapter | None], prompts: Sequence[list[int]], rng: random.Random
) -> list[torch.Tensor]:
    """Logits of every prompt token; row i has adapter i; chunks of random sizes side by side, in scattered pages.

    Every tensor of each adapter must find its place.
    """
    decoder, kv, count = _decoder(base, adapters, rng), allocate_kv(base, 1 + _ROW_PAGES * len(adapters)), len(adapters)
    virtual = [0 if one is None or one.soft_prompt is None else len(one.soft_prompt) for one in adapters]
    rows = [[-1] * before + prompt for before, prompt in zip(virtual, prompts, strict=True)]
    assert max(len(row) for row in rows) <= _ROW_PAGES * PAGE_SIZE
    pages = [range(1 + _ROW_PAGES * i, 1 + _ROW_PAGES * (i + 1)) for i in range(count)]
    done, found = [0] * count, [[] for _ in rows]
    while any(at < len(row) for at, row in zip(done, rows, strict=True)):
        chunks = [(i, min(rng.randint(1, 9), len(rows[i]) - done[i])) for i in range(count) if done[i] < len(rows[i])]
        inputs = [
            RowInput(
                rows[i][done[i] : done[i] + n], done[i], pages[i], NO_ADAPTER if adapters[i] is None else i, n,
                virtual=virtual[i],
            )
            for i, n in chunks
        ]  # fmt: skip
        for (i, n), part in zip(chunks, step(decoder, kv, inputs), strict=True):
            found[i].append(part)
            done[i] += n
    return [torch.cat(parts)[before:] for parts, before in zip(found, virtual, strict=True)]


def logits_alone(base: Base, adapter: Adapter | None, prompt: list[int]) -> torch.Tensor:
    """The same of one row by itself."""
    return logits(base, [adapter], [prompt], random.Random(len(prompt)))[0]


def _decoder(base: Base, adapters: Sequence[Adapter | None], rng: random.Random) -> Decoder:
    pool = allocate_pool(base.config, _PAGES, len(adapters), _SLOT_PAGES, torch.float32, CPU)
    free = rng.sample(range(1, _PAGES), _PAGES - 1)
    for slot, adapter in enumerate(adapters):
        if adapter is not None:
            pages = tuple(free.pop() for _ in range(page_count(adapter, base.config)))
            used = write_adapter(pool, base.config, slot, pages, adapter, base)
            assert used == sum(1 for _ in adapter.tensors())
    return Decoder(base, pool)
