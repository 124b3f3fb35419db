"""The whole decoder on the GPU: a row of a mixed batch is bit for bit what it is alone, and near the CPU in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import pytest
import torch

from adaplex_adapters.spec import KIND_LORA, Adapter, AdapterSpec, LoraModule
from adaplex_server.model import families
from adaplex_server.model.adapter_pool import RANK_PAGE, AdapterPool, allocate_pool, write_adapter
from adaplex_server.model.base import Base, LayerWeights, NormWeights
from adaplex_server.model.batch_builder import RowInput, build_batch
from adaplex_server.model.config import ModelConfig, parse_config
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.families import linear_targets, module_paths
from adaplex_server.model.formats.dense import DenseLinear
from adaplex_server.model.formats.gptq import GptqLinear, gptq_linear
from adaplex_server.model.formats.int8 import Int8Linear
from adaplex_server.model.formats.nf4 import Nf4Linear, nf4_linear
from adaplex_server.model.kv_cache import KvCache
from adaplex_server.model.linear import Linear
from adaplex_server.model.random_base import random_base
from adaplex_server.model.warm_up import warm_up

CUDA = torch.device("cuda")
PAGE = 16
RANKS = (1, 8, 24, 64)
# Per row, and again from the seventh on: prompt tokens, adapter slot (-1: the base).
ROWS = ((5, 0), (23, -1), (17, 3), (1, 1), (33, 2), (9, 3))

_SHAPE: Mapping[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 448,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 331,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 12},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "gpt_neox": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 64, "sliding_window": 12, "query_pre_attn_scalar": 96},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"num_key_value_heads": 2, "sliding_window": 12},
    "opt": {"ffn_dim": 448},
    "bloom": {"n_layer": 3, "n_head": 4},
    "gpt2": {"n_embd": 256, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
}
CASES = [
    ("llama", "nf4"),
    ("llama", "gptq"),
    ("llama", "none"),
    ("mistral", "nf4"),
    ("qwen2", "gptq"),
    ("qwen3", "nf4"),
    ("gemma2", "nf4"),
    ("gemma3_text", "fp4"),
    ("phi3", "int8-absmax"),
    ("opt", "int8-zeropoint"),
    ("bloom", "nf4"),
    ("gpt2", "fp4"),
    ("falcon", "gptq"),
]


def config_of(family: str) -> ModelConfig:
    return parse_config({**_SHAPE, **FAMILIES[family], "model_type": family}, {}, family)


def on_gpu(base: Base, dtype: torch.dtype) -> Base:
    """The same weights on the GPU, each linear as it would be there."""

    def norm(weights: NormWeights) -> NormWeights:
        exact = families.FAMILIES[base.config.family].norm_offset != 0.0
        weight = weights.weight.to(CUDA) if exact else moved(weights.weight)
        return NormWeights(weight, None if weights.bias is None else moved(weights.bias))

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(CUDA, dtype)

    def linear(found: Linear) -> Linear:
        bias = None if found.bias is None else moved(found.bias)
        if isinstance(found, DenseLinear):
            return DenseLinear(moved(found.weight), bias)
        if isinstance(found, GptqLinear):
            return gptq_linear(_on_gpu(found.weight), bias, dtype)
        if isinstance(found, Int8Linear):
            return Int8Linear(_on_gpu(found.weight), bias)
        assert isinstance(found, Nf4Linear)
        plain = replace(found.weight, codes=found.weight.codes.to(CUDA), absmax=found.weight.plain_absmax().to(CUDA))
        return nf4_linear(plain, bias, dtype)

    layers = tuple(
        LayerWeights(
            MappingProxyType({name: norm(weights) for name, weights in layer.norms.items()}),
            MappingProxyType({name: linear(found) for name, found in layer.linears.items()}),
        )
        for layer in base.layers
    )
    embedding = moved(base.embedding)
    head = embedding if base.head is base.embedding else moved(base.head)
    return Base(
        base.config, embedding, layers, norm(base.final_norm), head, base.format,
        positions=None if base.positions is None else moved(base.positions),
        embedding_norm=None if base.embedding_norm is None else norm(base.embedding_norm),
        head_bias=None if base.head_bias is None else moved(base.head_bias),
    )  # fmt: skip


def _on_gpu(weight: Any) -> Any:
    """A weight with its tensors on the GPU."""
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return replace(weight, **{name: v.to(CUDA) for name, v in values.items() if isinstance(v, torch.Tensor)})


def adapter_of(config: ModelConfig, rank: int) -> Adapter:
    """On every module, strong enough to change the logits; the first target of each linear has a smaller rank."""
    modules: dict[str, LoraModule] = {}
    for layer in range(config.num_layers):
        for linear, targets in linear_targets(config).items():
            paths = module_paths(config, layer, linear)
            for at, (path, (begin, end)) in enumerate(zip(paths, targets.spans, strict=True)):
                own = max(1, rank // 2) if at == 0 else rank
                a = torch.randn(own, targets.in_features) * targets.in_features**-0.5
                modules[path] = LoraModule(a, torch.randn(end - begin, own) * 0.3, own**-0.5)
    spec = AdapterSpec(f"rank{rank}", KIND_LORA, rank, (), 0, 0, "")
    return Adapter(spec, MappingProxyType(modules))


@dataclass
class Model:
    """A decoder with its pool and pages, and rows whose pages never change."""

    decoder: Decoder
    kv: KvCache
    device: torch.device

    @staticmethod
    def make(base: Base, adapters: Sequence[Adapter], dtype: torch.dtype) -> Model:
        config, device = base.config, base.device
        pages_per_slot = -(-max(RANKS) // RANK_PAGE)
        pages = 1 + sum(-(-rank // RANK_PAGE) for rank in RANKS)
        pool: AdapterPool = allocate_pool(config, pages, len(RANKS), pages_per_slot, dtype, device)
        free = list(range(1, pages))
        for slot, (rank, adapter) in enumerate(zip(RANKS, adapters, strict=True)):
            own = tuple(free.pop() for _ in range(-(-rank // RANK_PAGE)))
            write_adapter(pool, config, slot, own, adapter)
        kv = KvCache.allocate(config.num_layers, 257, PAGE, config.num_kv_heads, config.head_dim, base.dtype, device)
        return Model(Decoder(base, pool), kv, device)

    def run(self, rows: Sequence[RowInput]) -> torch.Tensor:
        return self.decoder.forward(build_batch(rows, PAGE, self.device), self.kv).cpu()


def prompts(rows: Sequence[int]) -> list[RowInput]:
    return [
        RowInput([(7 * row + 3 * at) % 331 for at in range(count)], 0, _pages(row), slot, count)
        for row in rows
        for count, slot in (_row(row),)
    ]


def next_tokens(rows: Sequence[int]) -> list[RowInput]:
    return [RowInput([row + 100], count, _pages(row), slot, 1) for row in rows for count, slot in (_row(row),)]


def _row(row: int) -> tuple[int, int]:
    return ROWS[row % len(ROWS)]


def _pages(row: int) -> list[int]:
    return [1 + 4 * row + at for at in range(4)]


@pytest.fixture
def models(request: pytest.FixtureRequest, dtype: torch.dtype) -> tuple[Model, Model]:
    """On the GPU in dtype, and on the CPU in float32."""
    family, form = request.param
    config = config_of(family)
    base = random_base(config, form, dtype=torch.float32, device="cpu", seed=torch.initial_seed() % 1000)
    adapters = [adapter_of(config, rank) for rank in RANKS]
    return Model.make(on_gpu(base, dtype), adapters, dtype), Model.make(base, adapters, torch.float32)


each_model = pytest.mark.parametrize("models", [*CASES, ("gpt_neox", "none")], indirect=True, ids="-".join)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.006, torch.float32: 1e-4}


@each_model
@each_dtype
def test_a_row_of_a_mixed_batch_has_the_bits_that_it_has_alone(models: tuple[Model, Model], dtype: torch.dtype) -> None:
    gpu, cpu = models
    everyone = range(len(ROWS))
    together = gpu.run(prompts(everyone))
    _near(together, cpu.run(prompts(everyone)), dtype)
    at = 0
    for row in everyone:
        count = ROWS[row][0]
        assert torch.equal(gpu.run(prompts([row])), together[at : at + count]), f"prompt of row {row}"
        at += count
    together = gpu.run(next_tokens(everyone))
    _near(together, cpu.run(next_tokens(everyone)), dtype)
    for row in everyone:
        assert torch.equal(gpu.run(next_tokens([row]))[0], together[row]), f"next token of row {row}"
    shuffled = [4, 1, 5, 0, 3, 2]
    assert torch.equal(gpu.run(next_tokens(shuffled)), together[shuffled])
    mixed = gpu.run([*next_tokens([2]), *prompts([4]), *next_tokens([0])])
    assert torch.equal(mixed[0], together[2])
    assert torch.equal(mixed[-1], together[0])


@pytest.mark.parametrize("models", [("llama", "nf4"), ("llama", "gptq"), ("qwen3", "nf4")], indirect=True, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
def test_float32_is_the_same_arithmetic_as_on_the_cpu(models: tuple[Model, Model], dtype: torch.dtype) -> None:
    gpu, cpu = models
    everyone = range(len(ROWS))
    for rows in (prompts(everyone), next_tokens(everyone)):
        _near(gpu.run(rows), cpu.run(rows), dtype)


@each_dtype
@pytest.mark.parametrize("models", [("llama", "nf4")], indirect=True, ids="-".join)
def test_nan_in_one_row_leaves_the_others_bit_for_bit(models: tuple[Model, Model], dtype: torch.dtype) -> None:
    gpu, _ = models
    everyone = range(len(ROWS))
    gpu.run(prompts(everyone))
    clean = gpu.run(next_tokens(everyone))
    for layer in (*gpu.kv.keys, *gpu.kv.values):
        layer[_pages(4)[0], 0] = float("nan")
    dirty = gpu.run(next_tokens(everyone))
    others = [0, 1, 2, 3, 5]
    assert torch.equal(dirty[others], clean[others])
    assert dirty[4].isnan().all()


@pytest.mark.parametrize("models", [("llama", "gptq"), ("llama", "nf4")], indirect=True, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bfloat16"])
def test_a_row_among_sixty_four(models: tuple[Model, Model], dtype: torch.dtype) -> None:
    gpu, _ = models
    many = range(64)
    for begin in range(0, 64, 16):
        gpu.run(prompts(many[begin : begin + 16]))
    together = gpu.run(next_tokens(many))
    for row in (0, 7, 31, 50, 63):
        assert torch.equal(gpu.run(next_tokens([row]))[0], together[row])
    assert torch.equal(gpu.run(next_tokens(many[20:53])), together[20:53])


@pytest.mark.parametrize("models", [("llama", "nf4")], indirect=True, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bfloat16"])
def test_no_kernel_is_compiled_once_warm(
    models: tuple[Model, Model], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the warm-up, no mix of rows waits for the compiler."""
    import triton

    gpu, _ = models
    warm_up(gpu.decoder, PAGE, 512)
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **seen: compiled.append(seen["repr"]))
    for rows in ([1], [0, 2], [3, 4, 5], range(7), range(19), range(33), range(64)):
        gpu.run(prompts(rows[:8]))
        gpu.run(next_tokens(rows))
        gpu.run([*next_tokens(rows[1:]), *prompts(rows[:1])])
    assert compiled == []


def _near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE[dtype], error
