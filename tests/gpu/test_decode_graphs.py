"""Captured decode steps: bit for bit the eager step, whatever rows, adapters, ranks and contexts meet in them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch

from adaplex_adapters.spec import KIND_LORA, Adapter, AdapterSpec, LoraModule
from adaplex_server.model.adapter_pool import RANK_PAGE, allocate_pool, write_adapter
from adaplex_server.model.batch_builder import RowInput, build_batch
from adaplex_server.model.config import ModelConfig, parse_config
from adaplex_server.model.decode_graphs import Decoded, DecodeGraphs
from adaplex_server.model.decode_inputs import GIVEN, DecodeRows
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.families import linear_targets, module_paths
from adaplex_server.model.kv_cache import KvCache
from adaplex_server.model.random_base import random_base

CUDA = torch.device("cuda")
PAGE = 16
RANKS = (1, 8, 16, 24, 64, 256)
VOCAB = 331
CONTEXT = 2500
PAGES = 4000
MAX_ROWS = 80

_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 448,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
}


def adapter_of(config: ModelConfig, rank: int) -> Adapter:
    modules: dict[str, LoraModule] = {}
    for layer in range(config.num_layers):
        for linear, targets in linear_targets(config).items():
            paths = module_paths(config, layer, linear)
            for path, (begin, end) in zip(paths, targets.spans, strict=True):
                a = torch.randn(rank, targets.in_features) * targets.in_features**-0.5
                modules[path] = LoraModule(a, torch.randn(end - begin, rank) * 0.3, rank**-0.5)
    spec = AdapterSpec(f"rank{rank}", KIND_LORA, rank, (), 0, 0, "")
    return Adapter(spec, MappingProxyType(modules))


@dataclass
class Model:
    """A decoder whose cache is full of random keys and values; slot i holds an adapter of rank RANKS[i]."""

    decoder: Decoder
    kv: KvCache
    graphs: DecodeGraphs
    chosen: torch.Tensor

    @staticmethod
    def make(family: str, form: str, dtype: torch.dtype, window: int | None = None) -> Model:
        raw = {**_SHAPE, "model_type": family, **({"sliding_window": window} if window else {})}
        config = parse_config(raw, {}, family)
        base = random_base(config, form, dtype=dtype, device=CUDA, seed=torch.initial_seed() % 1000)  # type: ignore[arg-type]
        counts = [-(-rank // RANK_PAGE) for rank in RANKS]
        pool = allocate_pool(config, 1 + sum(counts), len(RANKS), max(counts), dtype, CUDA)
        free = list(range(1, 1 + sum(counts)))
        for slot, (rank, count) in enumerate(zip(RANKS, counts, strict=True)):
            write_adapter(pool, config, slot, tuple(free.pop() for _ in range(count)), adapter_of(config, rank))
        kv = KvCache.allocate(config.num_layers, PAGES, PAGE, config.num_kv_heads, config.head_dim, dtype, CUDA)
        for layer in (*kv.keys, *kv.values):
            layer[1:].normal_()
        decoder = Decoder(base, pool, CONTEXT)
        chosen = torch.zeros(MAX_ROWS, dtype=torch.int64, device=CUDA)
        return Model(decoder, kv, DecodeGraphs(decoder, kv, MAX_ROWS, CONTEXT, chosen), chosen)

    def rows(self, rng: random.Random, count: int, slots: list[int], longest: int = CONTEXT) -> DecodeRows:
        free = rng.sample(range(1, PAGES), PAGES - 1)
        positions = [rng.randrange(min(longest, 40 * PAGE) if rng.random() < 0.9 else longest) for _ in range(count)]
        pages = [[free.pop() for _ in range(at // PAGE + 1)] for at in positions]
        tokens = [rng.randrange(VOCAB) for _ in positions]
        return DecodeRows(tokens, positions, pages, [rng.choice(slots) for _ in positions])

    def memory(self) -> list[torch.Tensor]:
        return [layer.clone() for layer in (*self.kv.keys, *self.kv.values)]

    def restore(self, memory: list[torch.Tensor]) -> None:
        for layer, saved in zip((*self.kv.keys, *self.kv.values), memory, strict=True):
            layer.copy_(saved)

    def eager(self, rows: DecodeRows) -> torch.Tensor:
        inputs = [
            RowInput([token], at, pages, slot)
            for token, at, pages, slot in zip(rows.tokens, rows.positions, rows.pages, rows.slots, strict=True)
        ]
        return self.decoder.forward(build_batch(inputs, PAGE, CUDA), self.kv)

    def captured(self, rows: DecodeRows) -> Decoded:
        found = self.graphs.run(rows)
        assert found is not None
        return Decoded(found.logits.clone(), found.best.clone())


CASES = [
    ("llama", "nf4", torch.bfloat16, None),
    ("llama", "gptq", torch.float16, None),
    ("mistral", "gptq", torch.bfloat16, 300),
    ("qwen3", "none", torch.bfloat16, None),
]


@pytest.mark.parametrize(("family", "form", "dtype", "window"), CASES)
def test_the_bits_of_the_eager_step(family: str, form: str, dtype: torch.dtype, window: int | None) -> None:
    model, rng = Model.make(family, form, dtype, window), random.Random(torch.initial_seed())
    mixes = [[-1], [-1, 0, 1, 2], [-1, *range(len(RANKS))], [3], list(range(len(RANKS))), [0]]
    for step in range(24):
        count = rng.choice([1, 2, 3, 7, 16, 17, rng.randint(18, MAX_ROWS), MAX_ROWS])
        longest = rng.choice([3, 1023, 1024, 1025, CONTEXT])
        rows = model.rows(rng, count, mixes[step % len(mixes)], longest)
        before = model.memory()
        found = model.captured(rows)
        after = model.memory()
        model.restore(before)
        wanted = model.eager(rows)
        assert torch.equal(found.logits, wanted), (step, count, longest)
        assert torch.equal(found.best, wanted.argmax(-1))
        for saved, layer in zip(after, (*model.kv.keys, *model.kv.values), strict=True):
            assert torch.equal(saved, layer), "only the rows' own keys and values are written"
    assert model.graphs.replays == 24
    assert 8 < len(model.graphs) <= 24


def test_rows_are_fed_with_what_the_step_before_chose() -> None:
    """Five steps without a word from the host, rows changing places: the tokens of five steps that it gives."""
    model, rng = Model.make("llama", "nf4", torch.bfloat16), random.Random(torch.initial_seed())
    rows = model.rows(rng, 20, [-1, 0, 1], longest=600)
    begins = [rng.randrange(len(pages) * PAGE - 4) for pages in rows.pages]
    orders = [rng.sample(range(20), 20)]
    for _ in range(4):
        orders.append(rng.sample(orders[-1], len(orders[-1]) - 2))
    before = model.memory()

    def run(fed: bool) -> list[torch.Tensor]:
        model.restore(before)
        tokens, places, found = dict(enumerate(rows.tokens)), dict.fromkeys(range(20), GIVEN), []
        for step, order in enumerate(orders):
            part = DecodeRows(
                [tokens[i] for i in order],
                [begins[i] + step for i in order],
                [rows.pages[i] for i in order],
                [rows.slots[i] for i in order],
                [places[i] for i in order],
            )
            found.append(model.captured(part).best)
            if fed:
                tokens, places = dict.fromkeys(order, 0), {i: place for place, i in enumerate(order)}
            else:
                tokens = dict(zip(order, found[-1].tolist(), strict=True))
        return found

    assert all(torch.equal(fed, given) for fed, given in zip(run(fed=True), run(fed=False), strict=True))


def test_a_capture_keeps_the_tokens_that_are_yet_to_be_fed() -> None:
    model, rng = Model.make("llama", "nf4", torch.bfloat16), random.Random(torch.initial_seed())
    first = model.captured(model.rows(rng, 30, [-1], longest=600)).best
    model.graphs.capture_common(seconds=5)
    assert torch.equal(model.chosen[:30], first)


def test_rows_that_join_and_leave_keep_their_bits() -> None:
    model, rng = Model.make("llama", "nf4", torch.bfloat16), random.Random(torch.initial_seed())
    rows = model.rows(rng, MAX_ROWS, [-1, *range(len(RANKS))])
    before = model.memory()
    together = model.captured(rows)
    for count in (1, 5, 33, 64, 2):
        some = rng.sample(range(MAX_ROWS), count)
        model.restore(before)
        part = DecodeRows(
            [rows.tokens[i] for i in some],
            [rows.positions[i] for i in some],
            [rows.pages[i] for i in some],
            [rows.slots[i] for i in some],
        )
        assert torch.equal(model.captured(part).logits, together.logits[some])


def test_an_adapter_that_comes_after_the_capture_is_served() -> None:
    model, rng = Model.make("llama", "gptq", torch.bfloat16), random.Random(torch.initial_seed())
    rows = model.rows(rng, 12, [0, 4], longest=600)
    first, captured = model.captured(rows), len(model.graphs)
    pool, config = model.decoder.pool, model.decoder.base.config
    assert pool is not None
    write_adapter(pool, config, 4, tuple(reversed(pool.host_pages[4])), adapter_of(config, 50))
    again = model.captured(rows)
    assert len(model.graphs) == captured
    assert torch.equal(again.logits, model.eager(rows))
    changed = torch.tensor([slot == 4 for slot in rows.slots])
    assert torch.equal((again.logits != first.logits).any(-1).cpu(), changed)


def test_a_row_of_nan_fails_alone() -> None:
    model, rng = Model.make("llama", "nf4", torch.bfloat16), random.Random(torch.initial_seed())
    rows = model.rows(rng, 9, [-1, 0, 3], longest=600)
    clean = model.captured(rows)
    for layer in (*model.kv.keys, *model.kv.values):
        layer[rows.pages[4][0], 0] = float("nan")
    rows.positions[4] = max(rows.positions[4], 1)
    dirty = model.captured(rows)
    assert ((model.chosen >= 0) & (model.chosen < VOCAB)).all(), "the next step is fed with a token, whatever it is"
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(dirty.logits[others], clean.logits[others])
    assert torch.equal(dirty.best[others], clean.best[others]) and dirty.best[4] == -1
    assert (clean.best >= 0).all()


def test_what_no_graph_fits_is_left_to_the_eager_step() -> None:
    model, rng = Model.make("llama", "none", torch.bfloat16), random.Random(torch.initial_seed())
    assert model.graphs.run(model.rows(rng, MAX_ROWS + 1, [-1], longest=100)) is None
    rows = model.rows(rng, 1, [-1], longest=100)
    rows.positions[0] = CONTEXT
    assert model.graphs.run(rows) is None
    assert len(model.graphs) == 0


def test_common_steps_are_captured_at_once_and_none_twice() -> None:
    model, rng = Model.make("llama", "nf4", torch.bfloat16), random.Random(torch.initial_seed())
    model.graphs.capture_common(seconds=0)
    assert len(model.graphs) == 0
    before = model.memory()
    model.graphs.capture_common(seconds=60)
    captured = len(model.graphs)
    assert captured > 20
    for saved, layer in zip(before, (*model.kv.keys, *model.kv.values), strict=True):
        assert torch.equal(saved, layer), "a capture writes no row's memory"
    for count in (1, 8, 40, 64):
        model.captured(model.rows(rng, count, [-1, 0, 1, 2], longest=900))
    assert len(model.graphs) == captured
