"""Adapter weights on the device, in pages of `RANK_PAGE` rank rows. Who holds which page is the engine's `AdapterSlots`, not this.

A LoRA of rank r takes ceil(r / RANK_PAGE) pages, the same ones in every layer and linear; rows beyond a module's own rank, and modules that the
adapter does not target, are zero. So mixed ranks lie side by side without padding each to the largest, and one page table serves all linears.

Notation: `linear` is one of the decoder's hot-path linears ("qkv", "o", "gate_up", "down"; a family's config names them), which may fuse several
targets (q, k, v) that share the input. G targets in the linear, K in-features, N out-features of the whole fused linear, S slots, Q pages a slot at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

RANK_PAGE = 8


@dataclass(frozen=True)
class LinearTargets:
    """The targets fused in one linear: their names ("q_proj", ...), and where each one's outputs begin and end in N ([begin, end))."""

    names: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    in_features: int
    out_features: int


@dataclass(frozen=True)
class LinearPool:
    """One linear's rank rows in all layers.

    a: [layers, pages * RANK_PAGE, G, K]; b: [layers, pages * RANK_PAGE, N]: rank row i of target g maps x to h = a[i, g] . x, and
    adds scaling * h * b[i, n] to output n, for n in the span of g. scaling: [layers, S, G] float32.
    """

    targets: LinearTargets
    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor


@dataclass(frozen=True)
class AdapterPool:
    """All linears' pools and the page table of the slots.

    slot_pages: [S, Q] int32, the pages of a slot in rank order, unused entries 0. slot_page_count: [S] int32. Page 0 belongs to nobody and stays zero.
    host_pages: the host's own copy, slot -> pages, replaced (never edited) when a slot changes.
    """

    linears: Mapping[str, LinearPool]
    slot_pages: torch.Tensor
    slot_page_count: torch.Tensor
    host_pages: dict[int, tuple[int, ...]]
