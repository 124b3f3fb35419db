"""Every kind of adapter in one batch on the GPU: each row bit for bit what it is alone, whoever is beside it; captured
steps bit for bit the eager ones; and near the CPU in float32.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch

from adaplex_adapters.spec import Adapter
from adaplex_server.model.adapter_image import page_count
from adaplex_server.model.adapter_pool import clear_slot, write_adapter
from adaplex_server.model.base import Base, load_base
from adaplex_server.model.batch import NO_ADAPTER
from adaplex_server.model.batch_builder import RowInput, build_batch
from adaplex_server.model.config import parse_config, read_config
from adaplex_server.model.decode_graphs import DecodeGraphs
from adaplex_server.model.decode_inputs import DecodeRows
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.kv_cache import KvCache
from adaplex_server.model.random_base import random_base
from adaplex_server.model.warm_up import warm_up
from support.side_by_side import (
    bottlenecks,
    decoder_of,
    dora,
    ia3,
    logits,
    lora,
    on_ends,
    replaced,
    soft_prompt,
)
from support.tiny_models import load_tiny, save_tiny

CUDA = torch.device("cuda")
PAGE = 16
VOCAB = 331
CONTEXT = 48
ROWS = 24
LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 448,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}
GEMMA = {
    **LLAMA,
    "model_type": "gemma2",
    "head_dim": 64,
    "sliding_window": 12,
    "query_pre_attn_scalar": 96,
}
# Adapters have its q, k and v as one linear, and its gate and up.
PHI = {**LLAMA, "model_type": "phi3"}
CASES = [
    (LLAMA, "nf4", torch.bfloat16),
    (LLAMA, "gptq", torch.float16),
    (GEMMA, "nf4", torch.bfloat16),
    (PHI, "gptq", torch.bfloat16),
]
BESIDE = 5
"""So many of `adapters_of`, at its end, change the embedding or the head."""


def adapters_of(base: Base) -> list[Adapter | None]:
    family = base.config.family
    other = ("sum", "stream") if family == "llama" else ("block", "block")
    both = replace(bottlenecks(base, 8, 3, other[0], "gelu"), modules=dora(base, 9, 3).modules)  # type: ignore[arg-type]
    return [
        None, lora(base, 9, 1), bottlenecks(base, 24, 2), both, dora(base, 3, 4), ia3(base, 5),
        bottlenecks(base, 1, 6, other[1], "tanh", ["mlp"]),  # type: ignore[arg-type]
        on_ends(base, 4, 7), on_ends(base, 9, 8, head=False), on_ends(base, 2, 9, embedding=False),
        replaced(base, 10, "head"), replaced(base, 11, "embedding", "head"),
    ]  # fmt: skip


@dataclass
class Model:
    """A decoder with adapter i in slot i, and pages full of random keys and values."""

    decoder: Decoder
    kv: KvCache
    adapters: list[Adapter | None]

    @staticmethod
    def make(raw: dict[str, object], form: str, dtype: torch.dtype) -> Model:
        seed = torch.initial_seed()
        config = parse_config(raw, {}, str(raw["model_type"]))
        base = random_base(config, form, dtype=dtype, device=CUDA, seed=seed % 1000)  # type: ignore[arg-type]
        adapters = adapters_of(base)
        pages = 1 + 4 * ROWS
        kv = KvCache.allocate(config.num_layers, pages, PAGE, config.num_kv_heads, config.head_dim, dtype, CUDA)
        for layer in (*kv.keys, *kv.values):
            layer[1:].normal_()
        return Model(decoder_of(base, adapters, random.Random(seed)), kv, adapters)

    def rows(self, rng: random.Random, tokens: int, kinds: range) -> list[RowInput]:
        """ROWS rows that compute so many tokens each."""
        slots = [rng.choice(kinds) for _ in range(ROWS)]
        return [
            RowInput(
                [rng.randrange(VOCAB) for _ in range(tokens)], rng.randrange(CONTEXT), range(1 + 4 * i, 5 + 4 * i),
                NO_ADAPTER if self.adapters[slot] is None else slot, tokens,
            )
            for i, slot in enumerate(slots)
        ]  # fmt: skip

    def run(self, rows: list[RowInput]) -> list[torch.Tensor]:
        found = self.decoder.forward(build_batch(rows, PAGE, CUDA), self.kv)
        assert torch.isfinite(found).all()
        return list(found.split([row.logits for row in rows]))


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]['model_type']}-{case[1]}")
def model(request: pytest.FixtureRequest) -> Model:
    return Model.make(*request.param)


@pytest.mark.parametrize("tokens", [1, 5])
def test_each_row_has_the_bits_that_it_has_alone(model: Model, tokens: int) -> None:
    """24 rows of one token, and of five: 120 tokens, which still go the way of few."""
    rng = random.Random(torch.initial_seed())
    rows = model.rows(rng, tokens, range(len(model.adapters)))
    mixed = model.run(rows)
    for row, found in zip(rows, mixed, strict=True):
        assert torch.equal(model.run([row])[0], found), row.slot
    plain = [row for row in rows if row.slot < 2]
    for row, found in zip(plain, model.run(plain), strict=True):
        assert torch.equal(found, mixed[rows.index(row)]), "rows are not what they are without other kinds beside them"


def test_captured_steps_have_the_bits_of_eager_ones(model: Model) -> None:
    rng, kinds = random.Random(torch.initial_seed()), len(model.adapters)
    chosen = torch.zeros(ROWS, dtype=torch.int64, device=CUDA)
    graphs = DecodeGraphs(model.decoder, model.kv, ROWS, CONTEXT + 1, chosen)
    for last in (kinds - BESIDE, 3, kinds - BESIDE, 2):
        rows = model.rows(rng, 1, range(last))
        found = graphs.run(_decode(rows))
        assert found is not None
        captured = found.logits.clone()
        assert torch.equal(captured, torch.cat(model.run(rows)))
    rows[7] = replace(rows[7], slot=kinds - 1)
    assert graphs.run(_decode(rows)) is None, "a head of one's own is left to the eager step"


def test_what_comes_to_a_slot_is_served_by_the_same_graph(model: Model) -> None:
    pool, base, rng = model.decoder.pool, model.decoder.base, random.Random(torch.initial_seed())
    assert pool is not None
    chosen = torch.zeros(ROWS, dtype=torch.int64, device=CUDA)
    graphs = DecodeGraphs(model.decoder, model.kv, ROWS, CONTEXT + 1, chosen)
    rows = model.rows(rng, 1, range(1, 4))
    assert graphs.run(_decode(rows)) is not None
    captured, held = len(graphs), pool.bottlenecks[2]
    clear_slot(pool, 2)
    adapter = bottlenecks(base, 20, 77, activation="leaky_relu")
    pages = (held.vectors, *held.weights)
    assert page_count(adapter, base.config) == len(pages)
    write_adapter(pool, base.config, 2, pages, adapter, base)
    found = graphs.run(_decode(rows))
    assert found is not None and len(graphs) == captured
    assert torch.equal(found.logits.clone(), torch.cat(model.run(rows)))


def _decode(rows: list[RowInput]) -> DecodeRows:
    return DecodeRows(
        [row.tokens[0] for row in rows], [row.start for row in rows], [list(row.pages) for row in rows],
        [row.slot for row in rows],
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["llama3", "gemma2", "gpt_neox-sequential", "opt", "gpt2", "phi3"])
def test_near_the_cpu(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, rng = tmp_path_factory.mktemp(kind), random.Random(torch.initial_seed())
    save_tiny(folder, kind)
    host = load_tiny(folder)
    base = load_base(
        folder, config=read_config(folder), quantize="none", double_quant=False, dtype=torch.float32, device=CUDA
    )
    adapters = [*adapters_of(host), soft_prompt(host, 3, 12)]
    prompts = [[rng.randrange(97) for _ in range(rng.choice([1, 9, 30]))] for _ in adapters]
    seed = rng.random()
    found = logits(base, adapters, prompts, random.Random(seed))
    for ours, wanted in zip(found, logits(host, adapters, prompts, random.Random(seed)), strict=True):
        assert (ours - wanted).norm() <= 1e-4 * wanted.norm()


def test_bottlenecks_are_compiled_in_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    model = Model.make(LLAMA, "nf4", torch.bfloat16)
    warm_up(model.decoder, PAGE, 64)
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **seen: compiled.append(seen["repr"]))
    model.run(model.rows(random.Random(1), 1, range(2, 4)))
    assert not [name for name in compiled if "_down[" in name or "_up[" in name], compiled
