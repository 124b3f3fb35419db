"""Bottlenecks in the decoder, beside every other kind in one batch, on every family that can have them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adaplex_adapters.errors import InvalidAdapter
from adaplex_server.kernels.bottleneck import ACTIVATIONS
from adaplex_server.model.adapter_pool import allocate_pool, clear_slot, write_adapter
from support import adapter_reference
from support.side_by_side import bottlenecks, dora, ia3, logits, logits_alone, lora, soft_prompt
from support.tiny_models import CPU, load_tiny, save_tiny

NATIVE = ["llama3", "mistral-window"]
"""Families for which the file format has bottlenecks that read something else than the block."""
FAMILIES = [*NATIVE, "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox-sequential", "opt", "bloom", "gpt2", "falcon-alibi"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_kind_side_by_side(kind: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, kind)
    base, rng = load_tiny(tmp_path), random.Random(7)
    other = ("sum", "stream") if kind in NATIVE else ("block", "block")
    adapters = [
        bottlenecks(base, 12, 1), lora(base, 9, 2), None, bottlenecks(base, 8, 3, other[0], "gelu"), dora(base, 3, 4),
        ia3(base, 5), soft_prompt(base, 3, 6), bottlenecks(base, 33, 8, other[1], "sigmoid", ["mlp"]),
        replace(bottlenecks(base, 1, 9, places=["attention"]), modules=lora(base, 8, 10).modules),
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
    adapters = [bottlenecks(base, 12, 1, "sum"), None, lora(base, 5, 2), bottlenecks(base, 20, 4), ia3(base, 3)]
    prompts = [[rng.randrange(97) for _ in range(length)] for length in (20, 9, 13, 1, 30)]
    mixed = logits(base, adapters, prompts, rng)
    for adapter, prompt, found in zip(adapters, prompts, mixed, strict=True):
        assert torch.equal(found, logits_alone(base, adapter, prompt))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama2")
    base = load_tiny(tmp_path)
    adapter, prompt = bottlenecks(base, 9, 1, activation=activation), [5, 3, 70, 8]
    expected = adapter_reference.logits(model, adapter, torch.tensor([prompt]))[0]
    torch.testing.assert_close(logits_alone(base, adapter, prompt), expected, atol=2e-4, rtol=2e-4)


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    for name, kind, adapter_of, words in (
        ("a", "gpt_neox", lambda base: bottlenecks(base, 4, 1), "side by side"),
        ("b", "gemma2", lambda base: bottlenecks(base, 4, 1, "stream"), "reads the stream"),
        ("c", "llama2", lambda base: bottlenecks(base, 65, 1), "65 wide"),
        ("d", "llama2", lambda base: bottlenecks(base, 17, 1), "max_rank"),
    ):
        save_tiny(tmp_path / name, kind)
        base = load_tiny(tmp_path / name)
        pool = allocate_pool(base.config, 9, 1, 2, torch.float32, CPU)
        with pytest.raises(InvalidAdapter, match=words):
            write_adapter(pool, base.config, 0, tuple(range(1, 9)), adapter_of(base))


def test_a_slot_written_again_has_only_what_it_holds(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama2")
    base = load_tiny(tmp_path)
    pool = allocate_pool(base.config, 5, 1, 2, torch.float32, CPU)
    write_adapter(pool, base.config, 0, (3, 1, 4), bottlenecks(base, 9, 1))
    assert pool.host_pages == {0: ()} and pool.bottlenecks[0].weights == (3, 1) and pool.bottlenecks[0].vectors == 4
    assert pool.bottleneck_table.tolist() == [[4, 2, 3, 1]]
    write_adapter(pool, base.config, 0, (2,), lora(base, 4, 1))
    assert pool.host_pages == {0: (2,)} and pool.bottlenecks == {}
    write_adapter(pool, base.config, 0, (3, 1, 4), bottlenecks(base, 9, 1))
    clear_slot(pool, 0)
    assert pool.bottlenecks == {} and not pool.bottleneck_table.any()


def test_vectors_keep_their_precision_in_half_precision(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama2")
    base = load_tiny(tmp_path)
    pool = allocate_pool(base.config, 5, 1, 2, torch.bfloat16, CPU)
    adapter = bottlenecks(base, 9, 1)
    write_adapter(pool, base.config, 0, (3, 1, 4), adapter)
    kept = pool.linears["down"].b[0, 4 * 8 : 4 * 8 + 4].float()
    one = adapter.bottlenecks[0, "mlp"]
    torch.testing.assert_close(kept[0] + kept[1], one.up_bias, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(kept[2] + kept[3], one.scaling, rtol=2e-5, atol=1e-6)
