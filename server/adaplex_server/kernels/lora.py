"""LoRA (Hu et al. 2021) on the fused linears, tokens of different adapters and ranks side by side.

    h[t, i, g] = a[i, g] . x[t]                                         rank rows i of token t's own slot, target g
    y[t, n]   += sum_i scaling[slot, g] * h[t, i, g] * b[i, n]          outputs n in the span of g

in float32 whatever the dtypes, rounded once into y. A token without an adapter is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adaplex_server.kernels import lora_cpu
from adaplex_server.kernels.finish import Shrunk
from adaplex_server.kernels.lora_tiles import LoraTiles, lora_tiles

if TYPE_CHECKING:
    from adaplex_server.kernels.gpu.prefill_lora import Expansion


@dataclass(frozen=True)
class LoraStack:
    """One linear's rank rows in all layers, as the adapter pool holds them; nothing is copied.

    a: [layers, pool rows, G, K]; b: [layers, pool rows, N]; scaling: [layers, slots, G] float32; spans: [begin, end) of
    each target in N.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LoraPages:
    """Where the slots lie: slot_pages [slots, pages at most] int32, slot_page_count [slots] int32, page_rows rank
    rows a page. host_pages: slot -> its pages, on the host.
    """

    slot_pages: torch.Tensor
    slot_page_count: torch.Tensor
    page_rows: int
    host_pages: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class LoraPlan:
    """Which tokens of a step have which adapter, laid out for the device: tiles on CUDA, linear -> groups elsewhere."""

    stacks: Mapping[str, LoraStack]
    pages: LoraPages
    tiles: LoraTiles | None
    groups: Mapping[str, tuple[lora_cpu.BoundGroup, ...]]


def plan_lora(
    stacks: Mapping[str, LoraStack],
    pages: LoraPages,
    row_tokens: Sequence[int],
    row_slots: Sequence[int],
) -> LoraPlan | None:
    """For the rows of a step; None when no row has an adapter (a negative slot is none).

    Good for other steps too, as long as the rows' tokens and slots and what is in these slots stay the same.
    """
    if all(slot < 0 for slot in row_slots):
        return None
    device = pages.slot_pages.device
    if device.type == "cuda":
        tiles = lora_tiles(row_tokens, row_slots, lambda slot: len(pages.host_pages[slot]), device)
        return LoraPlan(stacks, pages, tiles, {})
    pool_pages = next(iter(stacks.values())).b.shape[1] // pages.page_rows
    groups = lora_cpu.group(row_tokens, row_slots, pages.host_pages, pages.page_rows, pool_pages)
    bound = {
        linear: tuple(lora_cpu.bind(found, stack.a, stack.b, stack.scaling, stack.spans) for found in groups)
        for linear, stack in stacks.items()
    }
    return LoraPlan(stacks, pages, None, bound)


def add_lora(y: torch.Tensor, x: torch.Tensor, plan: LoraPlan, linear: str, layer: int) -> None:
    """y: [T, N] += the delta of each token's own adapter on x: [T, K], in place."""
    if y.is_cuda:
        from adaplex_server.kernels.gpu.prefill_lora import expand

        expand(y, expansion(x, plan, linear, layer))
        return
    for bound in plan.groups[linear]:
        lora_cpu.add(y, x, bound, layer)


def add_lora_and_activate(
    y: torch.Tensor, x: torch.Tensor, plan: LoraPlan, linear: str, layer: int, activation: str
) -> torch.Tensor:
    """On a GPU: `kernels.activation.activate`, gated, of y [T, 2F] with the deltas, in one pass over y."""
    from adaplex_server.kernels.gpu.prefill_lora import expand_activation

    return expand_activation(y, expansion(x, plan, linear, layer), activation)


def expansion(x: torch.Tensor, plan: LoraPlan, linear: str, layer: int) -> Expansion:
    """On a GPU: what the adapters add to the linear's output on x, for many tokens."""
    from adaplex_server.kernels.gpu.prefill_lora import Expansion, SlotPages, shrink

    stack, tiles = plan.stacks[linear], plan.tiles
    assert tiles is not None
    slots, b = SlotPages(plan.pages.slot_pages, plan.pages.slot_page_count, plan.pages.page_rows), stack.b[layer]
    h = shrink(x, stack.a[layer], stack.scaling[layer], slots, tiles, b.dtype)
    return Expansion(h, b, stack.spans, slots, tiles)


def unshrunk(x: torch.Tensor, plan: LoraPlan, linear: str, layer: int) -> Shrunk:
    """On a GPU, for a plan with the slots of all tokens: what the adapters add, but for h, which `shrink` computes."""
    from adaplex_server.kernels.gpu.shrink import empty_h

    stack, pages, tiles = plan.stacks[linear], plan.pages, plan.tiles
    assert tiles is not None
    h = empty_h(x, tiles.max_pages, pages.page_rows, len(stack.spans))
    where = pages.slot_pages, pages.slot_page_count
    return Shrunk(h, stack.b[layer], stack.scaling[layer], stack.spans, *where, pages.page_rows, tiles)


def shrink(found: Shrunk, x: torch.Tensor, plan: LoraPlan, linear: str, layer: int, *, beside: bool) -> None:
    """h of what `unshrunk` gave, right after the base's product of x has been launched. beside: that product is one of
    this package's kernels.
    """
    from adaplex_server.kernels.gpu.shrink import shrink

    tiles = found.tiles
    shrink(
        x, plan.stacks[linear].a[layer], found.h, found.slot_pages, found.slot_page_count, tiles.order, tiles.tiles,
        tiles.tile_tokens, tiles.max_pages, found.page_rows, beside,
    )  # fmt: skip


def reference(
    y: torch.Tensor, x: torch.Tensor, stack: LoraStack, pages: LoraPages, layer: int, slots: Sequence[int]
) -> torch.Tensor:
    """What y becomes, token by token as the formula says it; on any device. slots: each token's."""
    out = y.clone()
    a, b, scaling = stack.a[layer], stack.b[layer], stack.scaling[layer]
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        own = torch.tensor(rank_rows(pages.host_pages[slot], pages.page_rows), device=y.device)
        h = torch.einsum("rgk,k->rg", a[own].float(), x[token].float()) * scaling[slot]
        for target, (begin, end) in enumerate(stack.spans):
            delta = h[:, target] @ b[own, begin:end].float()
            out[token, begin:end] = (y[token, begin:end].float() + delta).to(y.dtype)
    return out


def rank_rows(pages: Sequence[int], page_rows: int) -> list[int]:
    """Rows of the pool that these pages are, in rank order."""
    return [page * page_rows + i for page in pages for i in range(page_rows)]
