"""Adapters copied beside the steps lie where a plain copy would put them, and nobody else's rows change."""

from __future__ import annotations

import torch

from adaplex_loadtest.engine_bench import random_adapters
from adaplex_loadtest.shapes import shape_config
from adaplex_server.model.adapter_image import AdapterImage, ImageLayout, lay_out
from adaplex_server.model.adapter_pool import AdapterPool, allocate_pool, clear_slot, write_adapter
from adaplex_server.model.adapter_writer import AdapterWriter
from adaplex_server.model.families import base_shape

CUDA = torch.device("cuda")
CONFIG = shape_config("tiny")
LAYOUT = ImageLayout.of(CONFIG, torch.bfloat16)


def image_of(rank: int) -> AdapterImage:
    (adapter,) = random_adapters(base_shape(CONFIG), rank, 1, torch.float32)

    def take(count: int) -> tuple[torch.Tensor, ...]:
        return torch.empty(count, LAYOUT.page_values, dtype=torch.bfloat16, pin_memory=True).unbind()

    return lay_out(adapter, LAYOUT, take)


def empty_pool() -> AdapterPool:
    return allocate_pool(CONFIG, 40, 8, 5, torch.bfloat16, CUDA)


def contents(pool: AdapterPool) -> list[torch.Tensor]:
    rows = [tensor for linear in pool.linears.values() for tensor in (linear.a, linear.b, linear.scaling)]
    return [tensor.clone() for tensor in (*rows, pool.slot_pages, pool.slot_page_count)]


def test_it_lies_where_a_plain_copy_puts_it() -> None:
    pool, plain = empty_pool(), empty_pool()
    writer = AdapterWriter(pool, LAYOUT)
    # Some slots more than once, several copies under way at a time, pages in any order.
    uses = [(0, 33, (5, 1, 9, 7, 3)), (1, 8, (2,)), (2, 17, (4, 6, 8)), (0, 1, (39,)), (1, 40, (38, 30, 20, 10, 11))]
    for slot, rank, pages in uses:
        writer.wait(slot)
        assert writer.landed(slot)
        writer.start(slot, pages, image_of(rank))
        (adapter,) = random_adapters(base_shape(CONFIG), rank, 1, torch.float32)
        write_adapter(plain, CONFIG, slot, pages, adapter)
    for slot in range(3):
        writer.wait(slot)
        assert writer.landed(slot)
    assert pool.host_pages == plain.host_pages
    for found, wanted in zip(contents(pool), contents(plain), strict=True):
        assert torch.equal(found, wanted)


def test_a_copy_does_not_wait_for_steps_and_is_not_seen_before_its_end() -> None:
    pool = empty_pool()
    writer = AdapterWriter(pool, LAYOUT)
    image = image_of(8)
    torch.cuda._sleep(400_000_000)
    writer.start(0, (1,), image)
    assert not writer.landed(0)
    writer.wait(0)
    assert writer.landed(0) and bool(pool.linears["qkv"].a[:, 8:16].any())


def test_a_slot_that_is_cleared_can_be_written_again() -> None:
    pool = empty_pool()
    writer = AdapterWriter(pool, LAYOUT)
    writer.start(3, (1, 2), image_of(16))
    writer.wait(3)
    assert writer.landed(3)
    clear_slot(pool, 3)
    writer.start(3, (2, 4), image_of(12))
    writer.wait(3)
    assert pool.slot_pages[3].tolist()[:3] == [2, 4, 0] and int(pool.slot_page_count[3]) == 2
