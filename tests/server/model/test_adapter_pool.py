"""Adapters laid out in the pool: what is where, what is counted, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.spec import Adapter, AdapterSpec, LoraModule
from adaplex_server.model.adapter_pool import (
    RANK_PAGE,
    AdapterPool,
    allocate_pool,
    bytes_per_page,
    clear_slot,
    write_adapter,
)
from adaplex_server.model.config import ModelConfig, read_config
from support.tiny_models import CONFIGS, CPU

Q, K, V = (f"model.layers.1.self_attn.{name}_proj" for name in "qkv")


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    CONFIGS["llama3"]().save_pretrained(tmp_path)
    return read_config(tmp_path)


def adapter_of(modules: dict[str, LoraModule]) -> Adapter:
    return Adapter(AdapterSpec("0" * 64, "lora", 1, (), 0, 0, ""), modules)


def random_module(rank: int, outputs: int, inputs: int, scaling: float) -> LoraModule:
    return LoraModule(torch.randn(rank, inputs), torch.randn(outputs, rank), scaling)


def taken(pool: AdapterPool) -> int:
    """Bytes of the rank rows of all linears."""
    return sum(linear.a.nbytes + linear.b.nbytes for linear in pool.linears.values())


def test_rows_of_a_fused_linear(config: ModelConfig) -> None:
    pool = allocate_pool(config, 6, 2, 3, torch.float32, CPU)
    assert taken(pool) == 6 * bytes_per_page(config, torch.float32)
    q, v = random_module(10, 64, 64, 0.5), random_module(3, 32, 64, 2.0)
    assert write_adapter(pool, config, 1, (4, 2), adapter_of({Q: q, V: v})) == 4
    qkv = pool.linears["qkv"]
    rows = [*range(4 * RANK_PAGE, 5 * RANK_PAGE), *range(2 * RANK_PAGE, 3 * RANK_PAGE)]
    a, b = qkv.a[1, rows], qkv.b[1, rows]
    assert torch.equal(a[:10, 0], q.a) and torch.equal(b[:10, :64], q.b.T)
    assert torch.equal(a[:3, 2], v.a) and torch.equal(b[:3, 96:], v.b.T)
    assert not a[10:].any() and not a[:, 1].any() and not a[3:, 2].any() and not b[:, 64:96].any()
    assert qkv.scaling[1].tolist() == [[0, 0, 0], [0.5, 0, 2.0]]
    assert pool.slot_pages.tolist() == [[0, 0, 0], [4, 2, 0]] and pool.slot_page_count.tolist() == [0, 2]
    assert pool.host_pages == {1: (4, 2)}
    assert not qkv.a[:, : 2 * RANK_PAGE].any() and not qkv.a[0].any()


def test_a_written_page_forgets_what_it_held(config: ModelConfig) -> None:
    pool = allocate_pool(config, 3, 2, 2, torch.float32, CPU)
    write_adapter(pool, config, 0, (1, 2), adapter_of({Q: random_module(16, 64, 64, 1.0)}))
    clear_slot(pool, 0)
    assert pool.host_pages == {} and not pool.slot_page_count.any() and not pool.linears["qkv"].scaling.any()
    k = random_module(2, 32, 64, 1.0)
    write_adapter(pool, config, 1, (1, 2), adapter_of({K: k}))
    assert not pool.linears["qkv"].a[:, :, 0].any() and not pool.linears["qkv"].b[:, :, :64].any()


def test_modules_without_a_place_are_not_counted(config: ModelConfig) -> None:
    pool = allocate_pool(config, 3, 2, 2, torch.float32, CPU)
    modules = {Q: random_module(1, 64, 64, 1.0), "model.layers.9.mlp.up_proj": random_module(1, 96, 64, 1.0)}
    assert write_adapter(pool, config, 0, (1,), adapter_of(modules)) == 2


def test_what_does_not_fit_is_refused(config: ModelConfig) -> None:
    pool = allocate_pool(config, 3, 2, 2, torch.float16, CPU)
    with pytest.raises(InvalidAdapter, match="rank 9"):
        write_adapter(pool, config, 0, (1,), adapter_of({Q: random_module(9, 64, 64, 1.0)}))
    huge = LoraModule(torch.full((1, 64), 1e6), torch.ones(64, 1), 1.0)
    with pytest.raises(InvalidAdapter, match="a weight is too large"):
        write_adapter(pool, config, 0, (1,), adapter_of({Q: huge}))
    assert pool.host_pages == {} and not pool.slot_page_count.any() and not pool.linears["qkv"].a.any()
