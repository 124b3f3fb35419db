"""DoRA and IA3 in the decoder, beside a LoRA, a soft prompt and the base in one batch, on every family."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.spec import KIND_IA3, KIND_LORA, KIND_PROMPT_TUNING, Adapter, LoraModule, Scale, draft
from adaplex_server.model.adapter_image import pages_of_rank
from adaplex_server.model.adapter_pool import allocate_pool, write_adapter
from adaplex_server.model.base import Base
from adaplex_server.model.batch import NO_ADAPTER
from adaplex_server.model.batch_builder import RowInput
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.families import base_shape, linear_targets, module_paths
from support import adapter_reference
from support.tiny_models import CPU, allocate_kv, load_tiny, save_tiny, step

FAMILIES = [
    "llama3",
    "llama-biases-tied",
    "qwen2",
    "gemma2",
    "phi3",
    "gpt_neox",
    "opt",
    "bloom",
    "gpt2",
    "falcon-groups",
]


def low_rank(base: Base, rank: int, seed: int, *, dora: bool) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, shape in base_shape(base.config).linears.items():
        a = torch.randn(rank, shape.in_features, generator=generator) * 0.2
        b = torch.randn(shape.out_features, rank, generator=generator) * 0.2
        magnitude = torch.rand(shape.out_features, generator=generator) * 4 if dora else None
        modules[path] = LoraModule(a, b, 0.7, magnitude)
    return Adapter(draft(KIND_LORA, "tiny"), modules=modules)


def ia3(base: Base, seed: int) -> Adapter:
    """Outputs of the fused linears' first target, and what goes into "down"."""
    generator, scales = torch.Generator().manual_seed(seed), {}
    linears = base_shape(base.config).linears
    for layer in range(base.config.num_layers):
        first = module_paths(base.config, layer, "qkv")[-1]
        scales[first] = Scale(torch.randn(linears[first].out_features, generator=generator), "output")
        down = module_paths(base.config, layer, "down")[0]
        scales[down] = Scale(torch.randn(linears[down].in_features, generator=generator), "input")
    return Adapter(draft(KIND_IA3, "tiny"), scales=scales)


def served(
    base: Base, adapters: list[Adapter | None], prompts: list[list[int]], rng: random.Random
) -> list[torch.Tensor]:
    """Logits of every prompt token; row i has adapter i; in chunks of random sizes, side by side."""
    config = base.config
    pool = allocate_pool(config, 16, len(adapters), 4, torch.float32, CPU)
    free = iter(rng.sample(range(1, 16), 15))
    for slot, adapter in enumerate(adapters):
        if adapter is not None:
            rank = max((module.a.shape[0] for module in adapter.modules.values()), default=0)
            factors = bool(adapter.scales) or any(m.magnitude is not None for m in adapter.modules.values())
            pages = tuple(next(free) for _ in range(pages_of_rank(rank) + factors))
            assert write_adapter(pool, config, slot, pages, adapter, base) == sum(1 for _ in adapter.tensors())
    decoder, kv = Decoder(base, pool), allocate_kv(base, 128)
    virtual = [0 if one is None or one.soft_prompt is None else len(one.soft_prompt) for one in adapters]
    rows = [[-1] * count + prompt for count, prompt in zip(virtual, prompts, strict=True)]
    done, found = [0] * len(rows), [[] for _ in rows]
    while any(at < len(row) for at, row in zip(done, rows, strict=True)):
        batch = [
            (i, min(rng.randint(1, 7), len(rows[i]) - done[i])) for i in range(len(rows)) if done[i] < len(rows[i])
        ]
        inputs = [
            RowInput(
                rows[i][done[i] : done[i] + n], done[i], range(1 + 8 * i, 9 + 8 * i),
                NO_ADAPTER if adapters[i] is None else i, n, virtual=virtual[i],
            )
            for i, n in batch
        ]  # fmt: skip
        for (i, n), logits in zip(batch, step(decoder, kv, inputs), strict=True):
            found[i].append(logits)
            done[i] += n
    return [torch.cat(parts)[count:] for parts, count in zip(found, virtual, strict=True)]


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_kind_side_by_side(kind: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, kind)
    base, rng = load_tiny(tmp_path), random.Random(3)
    prompt = Adapter(draft(KIND_PROMPT_TUNING, "tiny"), soft_prompt=torch.randn(3, base.config.hidden_size))
    adapters = [
        low_rank(base, 3, 1, dora=True), ia3(base, 2), None, low_rank(base, 9, 3, dora=False), prompt,
        low_rank(base, 8, 4, dora=True),
    ]  # fmt: skip
    prompts = [[rng.randrange(97) for _ in range(length)] for length in (9, 14, 7, 5, 3, 1)]
    for adapter, text, found in zip(adapters, prompts, served(base, adapters, prompts, rng), strict=True):
        plain = model(torch.tensor([text])).logits[0]
        expected = plain if adapter is None else adapter_reference.logits(model, adapter, torch.tensor([text]))[0]
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(found, expected, atol=2e-4 * max(scale, 1.0), rtol=2e-4)
        assert adapter is None or not torch.allclose(plain, expected, atol=1e-2)


def test_a_factor_on_a_shared_input_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama3")
    base = load_tiny(tmp_path)
    path = module_paths(base.config, 0, "qkv")[0]
    adapter = Adapter(draft(KIND_IA3, "tiny"), scales={path: Scale(torch.rand(64), "input")})
    pool = allocate_pool(base.config, 4, 1, 1, torch.float32, CPU)
    with pytest.raises(InvalidAdapter, match="q_proj"):
        write_adapter(pool, base.config, 0, (1,), adapter, base)


def test_a_half_precision_pool_keeps_factors_finely(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama3")
    base = load_tiny(tmp_path)
    pool = allocate_pool(base.config, 4, 1, 1, torch.bfloat16, CPU)
    adapter = ia3(base, 2)
    write_adapter(pool, base.config, 0, (2,), adapter, base)
    row = pool.factor_rows[0]
    path = module_paths(base.config, 1, "qkv")[-1]
    begin, end = linear_targets(base.config)["qkv"].spans[-1]
    kept = pool.linears["qkv"].b[1, row : row + 2, begin:end].float().sum(0)
    torch.testing.assert_close(kept, adapter.scales[path].vector, rtol=2e-5, atol=1e-6)
