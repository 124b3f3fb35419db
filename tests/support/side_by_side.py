"""Adapters of every kind for a tiny base, and the decoder with all of them in one batch, in chunks of random sizes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from adaplex_adapters.spec import (
    KIND_BOTTLENECK,
    KIND_DORA,
    KIND_IA3,
    KIND_LORA,
    KIND_PROMPT_TUNING,
    Adapter,
    Bottleneck,
    LoraModule,
    Place,
    Reads,
    Scale,
    draft,
)
from adaplex_server.engine.assembly import pool_dtype
from adaplex_server.model.adapter_image import page_count
from adaplex_server.model.adapter_pool import allocate_pool, write_adapter
from adaplex_server.model.base import Base
from adaplex_server.model.batch import NO_ADAPTER
from adaplex_server.model.batch_builder import RowInput
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.families import base_shape, module_paths
from support.tiny_models import PAGE_SIZE, allocate_kv, step

PLACES: tuple[Place, ...] = ("attention", "mlp")
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


def bottlenecks(
    base: Base,
    width: int,
    seed: int,
    reads: Reads = "block",
    activation: str = "silu",
    places: Sequence[Place] = PLACES,
) -> Adapter:
    """In every layer, but narrower ones in the second, whose MLP has none."""
    generator, hidden = torch.Generator().manual_seed(seed), base.config.hidden_size

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 1.6 * hidden**-0.5

    def one(m: int) -> Bottleneck:
        scaling = values(hidden) + 1 if seed % 2 else torch.tensor([0.75])
        return Bottleneck(values(m, hidden), values(m), values(hidden, m), values(hidden), activation, scaling, reads)

    found = {
        (layer, place): one(max(1, width // 2) if layer == 1 else width)
        for layer in range(base.config.num_layers)
        for place in places
        if (layer, place) != (1, "mlp")
    }
    return Adapter(draft(KIND_BOTTLENECK, "tiny"), bottlenecks=found)


def on_ends(base: Base, rank: int, seed: int, *, embedding: bool = True, head: bool = True) -> Adapter:
    """LoRAs of the embedding and the head."""
    generator, shape, config = torch.Generator().manual_seed(seed), base_shape(base.config), base.config

    def values(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * 0.4

    modules = {}
    if embedding:
        a, b = values(rank, config.vocab_size), values(config.hidden_size, rank)
        modules[shape.embedding] = LoraModule(a, b, 0.5, embedding=True)
    if head:
        modules[shape.head] = LoraModule(values(rank, config.hidden_size), values(config.vocab_size, rank), 0.25)
    return Adapter(draft(KIND_LORA, "tiny"), modules=modules)


def replaced(base: Base, seed: int, *places: str) -> Adapter:
    """Weights in the place of the base's "embedding" or "head"."""
    shape, size = base_shape(base.config), (base.config.vocab_size, base.config.hidden_size)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        path: torch.randn(size, generator=generator) * 0.3
        for place, path in (("embedding", shape.embedding), ("head", shape.head))
        if place in places
    }
    return Adapter(draft(KIND_LORA, "tiny"), replaced=weights)


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
    decoder = decoder_of(base, adapters, rng)
    kv, count = allocate_kv(base, 1 + _ROW_PAGES * len(adapters)), len(adapters)
    virtual = [0 if one is None or one.soft_prompt is None else len(one.soft_prompt) for one in adapters]
    rows = [[-1] * before + prompt for before, prompt in zip(virtual, prompts, strict=True)]
    assert max(len(row) for row in rows) <= _ROW_PAGES * PAGE_SIZE
    pages = [range(1 + _ROW_PAGES * i, 1 + _ROW_PAGES * (i + 1)) for i in range(count)]
    done = [0] * count
    found: list[list[torch.Tensor]] = [[] for _ in rows]
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
            found[i].append(part.cpu())
            done[i] += n
    return [torch.cat(parts)[before:] for parts, before in zip(found, virtual, strict=True)]


def logits_alone(base: Base, adapter: Adapter | None, prompt: list[int]) -> torch.Tensor:
    """The same of one row by itself."""
    return logits(base, [adapter], [prompt], random.Random(len(prompt)))[0]


def decoder_of(base: Base, adapters: Sequence[Adapter | None], rng: random.Random) -> Decoder:
    """With adapter i in slot i; a pool of `pool_dtype`."""
    dtype = pool_dtype(base.dtype, base.device)
    pool = allocate_pool(base.config, _PAGES, len(adapters), _SLOT_PAGES, dtype, base.device)
    free = rng.sample(range(1, _PAGES), _PAGES - 1)
    for slot, adapter in enumerate(adapters):
        if adapter is not None:
            pages = tuple(free.pop() for _ in range(page_count(adapter, base.config)))
            used = write_adapter(pool, base.config, slot, pages, adapter, base)
            assert used == sum(1 for _ in adapter.tensors())
    return Decoder(base, pool)
