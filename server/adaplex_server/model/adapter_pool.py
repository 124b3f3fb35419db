"""Adapter weights on the device, in pages of `RANK_PAGE` rank rows. Who holds which page is the engine's
`AdapterSlots`, not this.

A LoRA of rank r takes ceil(r / RANK_PAGE) pages, the same ones in every layer and linear; rows beyond a module's own
rank, and modules that the adapter does not target, are zero. So mixed ranks lie side by side without padding each to
the largest, and one page table serves all linears.

Notation: `linear` is one of the decoder's hot-path linears ("qkv", "o", "gate_up", "down"; a family's config names
them), which may fuse several targets (q, k, v) that share the input. G targets in the linear, K in-features, N
out-features of the whole fused linear, S slots, Q pages a slot at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.spec import Adapter
from adaplex_server.model.adapter_image import RANK_PAGE, AdapterImage, ImageLayout, lay_out
from adaplex_server.model.base import Base
from adaplex_server.model.batch import NO_ADAPTER
from adaplex_server.model.bottlenecks import TABLE_HEAD, BottleneckPages, table_line
from adaplex_server.model.config import ModelConfig
from adaplex_server.model.ends import Ends
from adaplex_server.model.families import LinearTargets, linear_targets
from adaplex_server.model.soft_prompt import SoftPrompt
from adaplex_server.model.upload import upload

__all__ = ["RANK_PAGE", "AdapterPool", "LinearPool", "allocate_pool", "bytes_per_page", "clear_slot", "write_adapter"]


@dataclass(frozen=True)
class LinearPool:
    """One linear's rank rows in all layers.

    a: [layers, pages * RANK_PAGE, G, K]; b: [layers, pages * RANK_PAGE, N]: rank row i of target g maps x to h = a[i,
    g] . x, and adds scaling * h * b[i, n] to output n, for n in the span of g. scaling: [layers, S, G] float32.
    """

    targets: LinearTargets
    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor


@dataclass(frozen=True)
class AdapterPool:
    """All linears' pools and the page table of the slots.

    slot_pages: [S, Q] int32, the pages of a slot in rank order, unused entries 0. slot_page_count: [S] int32. Page 0
    belongs to nobody and stays zero.
    host_pages: the host's own copy, slot -> pages, replaced (never edited) when a slot changes. slot_factor: [S] int32,
    the first pool row of the slot's page of factors, -1 without one; factor_rows: the same on the host, of those that
    have one. bottleneck_table: [S, 2 + Q] int32, where a slot's bottlenecks are (`BottleneckPlan`); bottlenecks: the
    same on the host, of those that have some. soft, ends: slot -> its adapter's soft prompt, embedding and head, on the
    device.
    """

    linears: Mapping[str, LinearPool]
    slot_pages: torch.Tensor
    slot_page_count: torch.Tensor
    host_pages: dict[int, tuple[int, ...]]
    slot_factor: torch.Tensor
    bottleneck_table: torch.Tensor
    factor_rows: dict[int, int] = field(default_factory=dict)
    bottlenecks: dict[int, BottleneckPages] = field(default_factory=dict)
    soft: dict[int, SoftPrompt] = field(default_factory=dict)
    ends: dict[int, Ends] = field(default_factory=dict)


def bytes_per_page(config: ModelConfig, dtype: torch.dtype) -> int:
    """Device bytes of one page over all layers and linears."""
    return ImageLayout.of(config, dtype).page_bytes


def allocate_pool(
    config: ModelConfig, pages: int, slots: int, max_pages_per_slot: int, dtype: torch.dtype, device: torch.device
) -> AdapterPool:
    """A pool of zeros with no adapter in it. pages counts page 0 too, which is never given away.

    dtype: float32 on the CPU, where the arithmetic is in float32 and another dtype would be converted in every step.
    """

    def zeros(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=of, device=device)

    layers, rows = config.num_layers, pages * RANK_PAGE
    linears = {
        name: LinearPool(
            targets=targets,
            a=zeros(layers, rows, len(targets.names), targets.in_features),
            b=zeros(layers, rows, targets.out_features),
            scaling=zeros(layers, slots, len(targets.names), of=torch.float32),
        )
        for name, targets in linear_targets(config).items()
    }
    return AdapterPool(
        linears=linears,
        slot_pages=zeros(slots, max_pages_per_slot, of=torch.int32),
        slot_page_count=zeros(slots, of=torch.int32),
        host_pages={},
        slot_factor=torch.full((slots,), -1, dtype=torch.int32, device=device),
        bottleneck_table=zeros(slots, TABLE_HEAD + max_pages_per_slot, of=torch.int32),
    )


@torch.inference_mode()
def write_adapter(
    pool: AdapterPool,
    config: ModelConfig,
    slot: int,
    pages: tuple[int, ...],
    adapter: Adapter,
    base: Base | None = None,
) -> int:
    """Bring an adapter to `pages` and make them `slot`'s, at once. base: needed for a DoRA. Returns the number of
    tensors that found their place.

    Whatever the pages held before is overwritten. Raises InvalidAdapter if a value is not finite in the pool's dtype
    or the pages are too few; the slot is empty then.
    """
    clear_slot(pool, slot)
    layout = ImageLayout.of(config, next(iter(pool.linears.values())).a.dtype)
    image = lay_out(
        adapter, layout, lambda count: torch.empty(count, layout.page_values, dtype=layout.dtype).unbind(), base
    )
    check_pages(pool, pages, image)
    device = pool.slot_pages.device
    for page, values in zip(pages, image.pages, strict=False):
        write_page(pool, layout, page, values.to(device))
    for page in pages[len(image.pages) :]:
        write_page(pool, layout, page, torch.zeros(layout.page_values, dtype=layout.dtype, device=device))
    own = rank_pages(image, pages)
    write_slot(pool, slot, own, torch.tensor(own, dtype=torch.int32).to(device), image.scaling.to(device))
    place_beside(pool, slot, pages, image)
    return image.used


@torch.inference_mode()
def place_beside(pool: AdapterPool, slot: int, pages: tuple[int, ...], image: AdapterImage) -> None:
    """Make the image's factors, bottlenecks, soft prompt, embedding and head the slot's, as far as it has them; in the
    current stream's order.
    """
    row = -1 if image.factor_page is None else pages[image.factor_page] * RANK_PAGE
    pool.slot_factor[slot].fill_(row)
    pool.factor_rows.pop(slot, None)
    if row >= 0:
        pool.factor_rows[slot] = row
    pool.bottlenecks.pop(slot, None)
    if image.bottleneck_pages:
        *weights, vectors = pages[len(image.pages) - image.bottleneck_pages : len(image.pages)]
        pool.bottlenecks[slot] = own = BottleneckPages(tuple(weights), vectors)
        table = pool.bottleneck_table
        table[slot].copy_(upload(table_line(own, table.shape[1]), torch.int32, table.device))
    pool.soft.pop(slot, None)
    if image.soft is not None:
        pool.soft[slot] = image.soft.on(pool.slot_pages.device)
    pool.ends.pop(slot, None)
    if image.ends is not None:
        pool.ends[slot] = image.ends.on(pool.slot_pages.device)


def with_rank(slots: Iterable[int], host_pages: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    """The slots, NO_ADAPTER in the place of those that hold no rank rows (of a soft prompt, for instance)."""
    return tuple(slot if slot >= 0 and host_pages[slot] else NO_ADAPTER for slot in slots)


def rank_pages(image: AdapterImage, pages: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the pages given for an image that hold rank rows."""
    return pages if image.rank_pages == len(image.pages) else pages[: image.rank_pages]


def check_pages(pool: AdapterPool, pages: tuple[int, ...], image: AdapterImage) -> None:
    """Raise InvalidAdapter if the image does not fit these pages, or its rank a slot."""
    most = pool.slot_pages.shape[1]
    if len(image.pages) > len(pages) or len(rank_pages(image, pages)) > most:
        raise InvalidAdapter(
            f"an adapter of rank {image.rank} does not fit {len(pages)} pages of {RANK_PAGE} rank rows"
        )
    if image.bottleneck_pages - 1 > most:
        raise InvalidAdapter(f"bottlenecks wider than {most * RANK_PAGE} do not fit this server (max_rank)")


def write_page(pool: AdapterPool, layout: ImageLayout, page: int, values: torch.Tensor) -> None:
    """A page of an image, on the pool's device, into page `page` of the pool; in the current stream's order."""
    for name, places in page_rows(pool, page):
        for rows, part in zip(places, layout.of_linear(values, name), strict=True):
            rows.copy_(part)


def page_rows(pool: AdapterPool, page: int) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Each linear's a [layers, RANK_PAGE, G, K] and b [layers, RANK_PAGE, N] of a page, as they lie in the pool."""
    rows = slice(page * RANK_PAGE, (page + 1) * RANK_PAGE)
    for name, linear in pool.linears.items():
        yield name, (linear.a[:, rows], linear.b[:, rows])


def write_slot(
    pool: AdapterPool, slot: int, pages: tuple[int, ...], table: torch.Tensor, scaling: torch.Tensor
) -> None:
    """Make `pages` the slot's. table: the same [len(pages)] int32; scaling as in `AdapterImage`; both on the device."""
    column = 0
    for linear in pool.linears.values():
        count = len(linear.targets.names)
        linear.scaling[:, slot] = scaling[:, column : column + count]
        column += count
    pool.slot_pages[slot, : len(pages)] = table
    pool.slot_pages[slot, len(pages) :] = 0
    # Not an assignment: to a single number that is a copy from the host, for which it would wait.
    pool.slot_page_count[slot].fill_(len(pages))
    # A new object each time, by which a plan made for the slot's former content is known to be stale.
    pool.host_pages[slot] = (*pages,)


@torch.inference_mode()
def clear_slot(pool: AdapterPool, slot: int) -> None:
    """No pages and no scaling in the slot. The pages' content stays until they are written again; nothing reads it."""
    pool.host_pages.pop(slot, None)
    for beside in (pool.soft, pool.ends, pool.factor_rows, pool.bottlenecks):
        beside.pop(slot, None)
    pool.slot_factor[slot].fill_(-1)
    pool.slot_page_count[slot].fill_(0)
    pool.slot_pages[slot] = 0
    pool.bottleneck_table[slot] = 0
    for linear in pool.linears.values():
        linear.scaling[:, slot] = 0
