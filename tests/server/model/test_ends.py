"""Adapters of the embedding and the head in the decoder, beside other kinds in one batch, on several families."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.spec import KIND_IA3, KIND_LORA, Adapter, Scale, draft
from adaplex_server.model.adapter_cost import device_bytes
from adaplex_server.model.adapter_image import ImageLayout, lay_out
from adaplex_server.model.adapter_pool import allocate_pool, clear_slot, write_adapter
from adaplex_server.model.families import base_shape
from support import adapter_reference
from support.side_by_side import dora, ia3, logits, logits_alone, lora, on_ends, replaced, soft_prompt
from support.tiny_models import CPU, load_tiny, save_tiny

FAMILIES = ["llama3", "llama-biases-tied", "gemma2", "gpt_neox", "opt", "bloom", "gpt2", "phi"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_kind_side_by_side(kind: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, kind)
    base, rng = load_tiny(tmp_path), random.Random(11)
    everything = replace(dora(base, 9, 1), modules={**dora(base, 9, 1).modules, **on_ends(base, 3, 1).modules})
    with_prompt = replace(soft_prompt(base, 5, 2), modules=on_ends(base, 2, 2, head=False).modules)
    adapters = [
        on_ends(base, 4, 3, head=False), lora(base, 9, 4), None, on_ends(base, 17, 5, embedding=False), everything,
        replaced(base, 6, "head"), ia3(base, 7), with_prompt, replaced(base, 8, "embedding", "head"),
        on_ends(base, 1, 9),
    ]  # fmt: skip
    prompts = [[rng.randrange(97) for _ in range(rng.choice([1, 5, 12]))] for _ in adapters]
    found = logits(base, adapters, prompts, rng)
    for adapter, prompt, mixed in zip(adapters, prompts, found, strict=True):
        plain = model(torch.tensor([prompt])).logits[0]
        expected = plain if adapter is None else adapter_reference.logits(model, adapter, torch.tensor([prompt]))[0]
        scale = max(float(expected.detach().abs().max()), 1.0)
        torch.testing.assert_close(mixed, expected, atol=3e-4 * scale, rtol=3e-4)
        assert adapter is None or not torch.allclose(plain, expected, atol=1e-2)


def test_each_row_has_the_bits_that_it_has_alone(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama3")
    base, rng = load_tiny(tmp_path), random.Random(9)
    adapters = [
        on_ends(base, 12, 1),
        None,
        lora(base, 5, 2),
        replaced(base, 4, "head"),
        on_ends(base, 2, 3, head=False),
    ]
    prompts = [[rng.randrange(97) for _ in range(length)] for length in (20, 9, 13, 1, 30)]
    mixed = logits(base, adapters, prompts, rng)
    for adapter, prompt, found in zip(adapters, prompts, mixed, strict=True):
        assert torch.equal(found, logits_alone(base, adapter, prompt))


@pytest.mark.parametrize("kind", ["llama3", "phi"])
def test_dora_and_factors_on_the_head(kind: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, kind)
    base = load_tiny(tmp_path)
    head = base_shape(base.config).head
    module = on_ends(base, 3, 1, embedding=False).modules[head]
    magnitude = torch.rand(base.config.vocab_size) * 4
    adapters = [
        Adapter(draft(KIND_LORA, "tiny"), modules={head: replace(module, magnitude=magnitude)}),
        Adapter(draft(KIND_IA3, "tiny"), scales={head: Scale(torch.randn(base.config.vocab_size), "output")}),
        Adapter(draft(KIND_IA3, "tiny"), scales={head: Scale(torch.randn(base.config.hidden_size), "input")}),
    ]
    prompts = [[4, 90, 3], [7, 7, 12, 33], [1]]
    for adapter, prompt, found in zip(
        adapters, prompts, logits(base, adapters, prompts, random.Random(1)), strict=True
    ):
        expected = adapter_reference.logits(model, adapter, torch.tensor([prompt]))[0]
        torch.testing.assert_close(found, expected, atol=5e-4, rtol=3e-4)


def test_a_copy_of_another_base_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama3")
    base = load_tiny(tmp_path, torch.bfloat16)
    shape, layout = base_shape(base.config), ImageLayout.of(base.config, torch.float32)
    adapter = on_ends(base, 3, 1)
    good = {shape.head: base.head.clone(), shape.embedding: base.embedding.float()}
    image = lay_out(replace(adapter, base_copies=good), layout, lambda count: [], base)
    assert image.used == image.given == 6 and image.rank == 0 and not image.pages
    other = base.embedding.clone()
    other[3, 5] += 0.1
    for copy in (other, base.embedding[:-1]):
        with pytest.raises(InvalidAdapter, match="wrong base"):
            lay_out(replace(adapter, base_copies={shape.embedding: copy}), layout, lambda count: [], base)


def test_what_they_take_is_counted_and_limited(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama3")
    base = load_tiny(tmp_path)
    layout, size = ImageLayout.of(base.config, torch.float32), base.head.numel() * 4
    adapter = replaced(base, 1, "head")
    image = lay_out(adapter, layout, lambda count: [], base, most_ends=size)
    assert image.ends is not None and image.ends.nbytes == size and image.nbytes == size + image.scaling.nbytes
    assert device_bytes(adapter, base.config, torch.float32) == size and not image.only_rank_rows
    with pytest.raises(InvalidAdapter, match="max_head_memory"):
        lay_out(adapter, layout, lambda count: [], base, most_ends=size - 1)
    adapter = Adapter(draft(KIND_LORA, "tiny"), replaced={base_shape(base.config).head: torch.full((97, 64), 1e30)})
    layout = ImageLayout.of(base.config, torch.float16)
    with pytest.raises(InvalidAdapter, match="too large"):
        lay_out(adapter, layout, lambda count: [], base)


def test_a_slot_written_again_has_only_what_it_holds(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama3")
    base = load_tiny(tmp_path)
    pool = allocate_pool(base.config, 3, 1, 1, torch.float32, CPU)
    write_adapter(pool, base.config, 0, (), on_ends(base, 3, 1), base)
    assert pool.ends.keys() == {0} and pool.host_pages == {0: ()}
    write_adapter(pool, base.config, 0, (1,), lora(base, 3, 1), base)
    assert pool.ends == {}
    write_adapter(pool, base.config, 0, (), on_ends(base, 3, 1), base)
    clear_slot(pool, 0)
    assert pool.ends == {}
