"""The keys and values of all rows on the device, in pages. Who holds which page is the engine's `PagePool`, not this.

Page 0 belongs to nobody and stays zero: padding entries of a page table point at it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaplex_server.model.upload import upload


@dataclass(frozen=True)
class KvCache:
    """keys, values: one tensor a layer, [pages, page_size, kv_heads, head_dim], in the dtype of the model's
    activations.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    page_size: int

    @staticmethod
    def allocate(
        layers: int,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KvCache:
        """Zeroed, so that no stale bit pattern can be read as NaN by a masked-out position."""

        def one() -> torch.Tensor:
            return torch.zeros(pages, page_size, kv_heads, head_dim, dtype=dtype, device=device)

        return KvCache(tuple(one() for _ in range(layers)), tuple(one() for _ in range(layers)), page_size)

    @staticmethod
    def bytes_per_page(layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Device bytes of one page over all layers, keys and values."""
        return 2 * layers * page_size * kv_heads * head_dim * dtype.itemsize

    def scrub(self, pages: list[int]) -> None:
        """Zero these pages: a row that failed may have left NaN, which even a zero attention weight would carry on."""
        index = upload(pages, torch.int64, self.keys[0].device)
        for layer in (*self.keys, *self.values):
            layer.index_fill_(0, index, 0)
