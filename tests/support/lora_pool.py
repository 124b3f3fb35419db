"""One linear's adapters of several ranks, as the server's adapter pool lays them out, and what they add in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaplex_server.kernels.lora_tiles import LoraTiles, lora_tiles

RANK_PAGE = 8
RANKS = (1, 8, 24, 256, 0, 16)


def pages_of(slot: int) -> int:
    return -(-RANKS[slot] // RANK_PAGE)


def tiles_of(rows: list[tuple[int, int]], device: torch.device) -> LoraTiles | None:
    """rows: (tokens, slot)."""
    return lora_tiles([row[0] for row in rows], [row[1] for row in rows], pages_of, device)


@dataclass(frozen=True)
class Pool:
    """One linear's rank rows, as `model.adapter_pool` lays them out. Rows of a module below its page's end are zero."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor
    slot_pages: torch.Tensor
    slot_page_count: torch.Tensor
    spans: tuple[tuple[int, int], ...]

    def delta(self, x: torch.Tensor, slot: int) -> torch.Tensor:
        out = torch.zeros(x.shape[0], self.b.shape[1], dtype=torch.float64, device=x.device)
        pages = self.slot_pages[slot, : int(self.slot_page_count[slot])].long()
        rows = (pages[:, None] * RANK_PAGE + torch.arange(RANK_PAGE, device=x.device)).flatten()
        for target, (begin, end) in enumerate(self.spans):
            h = x.double() @ self.a[rows, target].double().t() * self.scaling[slot, target].double()
            out[:, begin:end] = h @ self.b[rows, begin:end].double()
        return out


def pool(k: int, spans: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> Pool:
    counts = [-(-rank // RANK_PAGE) for rank in RANKS]
    total = sum(counts) + 1
    a = torch.randn(total * RANK_PAGE, len(spans), k, device=device) * k**-0.5
    b = torch.randn(total * RANK_PAGE, spans[-1][1], device=device)
    free = (torch.randperm(total - 1, device=device) + 1).tolist()
    slot_pages = torch.zeros(len(RANKS), max(counts), dtype=torch.int32, device=device)
    for slot, rank in enumerate(RANKS):
        own = [free.pop() for _ in range(counts[slot])]
        slot_pages[slot, : len(own)] = torch.tensor(own, dtype=torch.int32)
        if own and rank % RANK_PAGE:
            a[own[-1] * RANK_PAGE + rank % RANK_PAGE : (own[-1] + 1) * RANK_PAGE] = 0
    scaling = torch.rand(len(RANKS), len(spans), device=device) + 0.5
    page_count = torch.tensor(counts, dtype=torch.int32, device=device)
    return Pool(a.to(dtype), b.to(dtype), scaling, slot_pages, page_count, spans)
