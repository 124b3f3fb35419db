"""The decoder against transformers and PEFT: every family, paged, in chunks, mixed; and rows that stay themselves."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from adaplex_adapters.reader import read_adapter
from adaplex_server.model.adapter_pool import RANK_PAGE, write_adapter
from adaplex_server.model.base import Base
from adaplex_server.model.batch import NO_ADAPTER
from adaplex_server.model.batch_builder import RowInput
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.families import base_shape
from support.sequences import cache_for, pool_of, run, sequences
from support.tiny_models import CONFIGS, load_tiny, save_tiny, step

LORAS = {
    "llama3": [(8, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]), (1, ["v_proj"])],
    "gpt_neox": [(3, ["query_key_value", "dense_4h_to_h"]), (20, ["dense", "dense_h_to_4h"])],
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_equal_transformers(kind: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, kind)
    base = load_tiny(tmp_path)
    rows = sequences([30, 1, 4, 5, 61, 17], [NO_ADAPTER] * 6, seed=1)
    run(Decoder(base, None, positions=64), cache_for(base, rows), rows, seed=2)
    for row in rows:
        with torch.no_grad():
            theirs = model(torch.tensor([row.tokens])).logits[0]
        torch.testing.assert_close(torch.cat(row.logits), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_sixteen_bits_are_near_to_thirty_two(kind: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, kind)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = load_tiny(tmp_path, dtype)
        rows = sequences([30, 7], [NO_ADAPTER] * 2, seed=1)
        run(Decoder(base, None, positions=64), cache_for(base, rows), rows, seed=2)
        found[dtype] = torch.cat([logits for row in rows for logits in row.logits])
    exact, near = found.values()
    assert (near - exact).norm() < 0.1 * exact.norm()


def test_longrope_beyond_its_original_context(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "phi3-longrope")
    base = load_tiny(tmp_path)
    rows = sequences([200, 70], [NO_ADAPTER] * 2, seed=1)
    run(Decoder(base, None), cache_for(base, rows), rows, seed=2)
    for row in rows:
        with torch.no_grad():
            theirs = model(torch.tensor([row.tokens])).logits[0]
        torch.testing.assert_close(torch.cat(row.logits), theirs, rtol=0, atol=1e-4)


def test_contexts_of_very_different_length(tmp_path: Path) -> None:
    """Decode rows on both sides of the least width that rows are padded to."""
    model = save_tiny(tmp_path, "mistral")
    base = load_tiny(tmp_path)
    rows = sequences([240, 3, 128, 129], [NO_ADAPTER] * 4, seed=3)
    kv, decoder = cache_for(base, rows), Decoder(base, None)
    step(decoder, kv, [replace(row.take(len(row.tokens) - 1), logits=0) for row in rows])
    last = [RowInput(row.tokens[-1:], len(row.tokens) - 1, row.pages) for row in rows]
    for row, logits in zip(rows, step(decoder, kv, last), strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor([row.tokens])).logits[0, -1:]
        torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_tokens_of_a_prompt_may_be_rows_of_the_same_pages(kind: str, tmp_path: Path) -> None:
    """Each sees those before it in the same step: what captured steps of few tokens build on."""
    save_tiny(tmp_path, kind)
    base = load_tiny(tmp_path)
    rows = sequences([23, 9], [NO_ADAPTER] * 2, seed=1)
    decoder, found = Decoder(base, None, positions=64), []
    for alone in (False, True):
        kv, works = cache_for(base, rows), [RowInput(row.tokens, 0, row.pages, logits=len(row.tokens)) for row in rows]
        step(decoder, kv, [replace(work, tokens=work.tokens[:4], logits=0) for work in works])
        rest = [replace(work, tokens=work.tokens[4:], start=4, logits=len(work.tokens) - 4) for work in works]
        if alone:
            rest = [RowInput([t], w.start + i, w.pages) for w in rest for i, t in enumerate(w.tokens)]
        found.append(torch.cat(step(decoder, kv, rest)))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def save_loras(kind: str, folder: Path) -> tuple[Base, PeftModel]:
    """A base and PEFT's model of it with adapters "lora0", "lora1", ... as LORAS says, saved in folders of these
    names.
    """
    model = save_tiny(folder / "base", kind)
    base = load_tiny(folder / "base")
    peft: PeftModel | None = None
    for i, (rank, targets) in enumerate(LORAS[kind]):
        torch.manual_seed(i)
        lora = LoraConfig(r=rank, lora_alpha=(2 + i) * rank, target_modules=targets, init_lora_weights=False)
        if peft is None:
            peft = get_peft_model(model, lora, adapter_name=f"lora{i}")
        else:
            peft.add_adapter(f"lora{i}", lora)
    assert peft is not None
    peft.save_pretrained(str(folder))
    return base, peft.eval()


@pytest.mark.parametrize("kind", LORAS)
@pytest.mark.parametrize("scattered", [False, True])
def test_mixed_adapters_equal_peft(kind: str, scattered: bool, tmp_path: Path) -> None:
    base, peft = save_loras(kind, tmp_path)
    ranks = [rank for rank, _ in LORAS[kind]]
    free = list(range(1, 12))
    if scattered:
        random.Random(0).shuffle(free)
    pages = [tuple(free.pop(0) for _ in range(-(-rank // RANK_PAGE))) for rank in ranks]
    pool = pool_of(base, [tmp_path / "lora0", tmp_path / "lora1"], pages)
    rows = sequences([50, 9, 33, 12, 41], [0, 1, NO_ADAPTER, 1, 0], seed=4)
    run(Decoder(base, pool), cache_for(base, rows), rows, seed=5)
    for row in rows:
        with torch.no_grad():
            if row.slot == NO_ADAPTER:
                with peft.disable_adapter():
                    theirs = peft(torch.tensor([row.tokens])).logits[0]
            else:
                peft.set_adapter(f"lora{row.slot}")
                theirs = peft(torch.tensor([row.tokens])).logits[0]
        torch.testing.assert_close(torch.cat(row.logits), theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_neighbour_changes_no_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Decode rows alone and beside others, one of which has an adapter whose numbers overflow."""
    save_loras("llama3", tmp_path)
    base = load_tiny(tmp_path / "base", dtype)
    pool = pool_of(base, [tmp_path / "lora0", tmp_path / "lora1", tmp_path / "lora0"], [(1,), (2,), (3,)])
    for linear in pool.linears.values():
        linear.a[:, 3 * RANK_PAGE :] = 1e38
        linear.b[:, 3 * RANK_PAGE :] = 1e38
    decoder = Decoder(base, pool)
    rows = sequences([20, 21, 3, 40], [0, 2, NO_ADAPTER, 1], seed=6)
    answers = []
    for company in ([0, 1, 2, 3], [0], [2], [3], [3, 2, 0]):
        kv = cache_for(base, rows)
        for i in company:
            step(decoder, kv, [replace(rows[i].take(len(rows[i].tokens) - 1), logits=0)])
        last = [RowInput(rows[i].tokens[-1:], len(rows[i].tokens) - 1, rows[i].pages, rows[i].slot) for i in company]
        answers.append(dict(zip(company, step(decoder, kv, last), strict=True)))
    mixed = answers[0]
    assert not torch.isfinite(mixed[1]).any()
    for alone in answers[1:]:
        for i, logits in alone.items():
            assert torch.isfinite(logits).all()
            if torch.backends.mkl.is_available():
                assert torch.equal(logits, mixed[i]), i
            else:
                torch.testing.assert_close(logits, mixed[i])


def test_a_slot_written_again_is_read_again(tmp_path: Path) -> None:
    """The plan kept from the step before must not outlive what is in the slot, even in the same pages."""
    base, _ = save_loras("llama3", tmp_path)
    pool = pool_of(base, [tmp_path / "lora0"], [(1,)])
    decoder = Decoder(base, pool)
    rows = sequences([6], [0], seed=7)
    kv = cache_for(base, rows)
    before = step(decoder, kv, [rows[0].take(6)])[0]
    assert torch.equal(before, step(decoder, kv, [rows[0].take(6)])[0])
    write_adapter(pool, base.config, 0, (1,), read_adapter(tmp_path / "lora1", base_shape(base.config)))
    after = step(decoder, kv, [rows[0].take(6)])[0]
    fresh = step(Decoder(base, pool), kv, [rows[0].take(6)])[0]
    assert torch.equal(after, fresh) and not torch.allclose(after, before, atol=0.01)


def test_no_adapter_is_the_base_alone(tmp_path: Path) -> None:
    base, _ = save_loras("llama3", tmp_path)
    pool = pool_of(base, [tmp_path / "lora0"], [(1,)])
    rows = sequences([12, 13], [NO_ADAPTER, 0], seed=8)
    mixed = step(Decoder(base, pool), cache_for(base, rows), [row.take(12) for row in rows])
    alone = step(Decoder(base, None), cache_for(base, rows), [rows[0].take(12)])
    torch.testing.assert_close(mixed[0], alone[0], rtol=0, atol=1e-5)
    assert not torch.allclose(mixed[1], alone[0], atol=0.1)
