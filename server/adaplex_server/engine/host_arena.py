"""Host memory for adapters, in blocks of one rank page each that are used again and again. Any thread may call.

Where a GPU copies from them the blocks are pinned. Pinning takes tens of milliseconds and may hold up the device, so it
is done in large slabs, ahead of need (`reserve`), and never undone.
"""

from __future__ import annotations

import threading

import torch

_SLAB = 256 << 20


class HostArena:
    """block: bytes of a page. Owns every block, and knows which are free."""

    def __init__(self, block: int, *, pinned: bool) -> None:
        self._block = block
        self._pinned = pinned
        self._lock = threading.RLock()  # a collection inside may give blocks back
        self._free: list[torch.Tensor] = []
        self._blocks = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, free or not."""
        return self._blocks * self._block

    def reserve(self, nbytes: int) -> None:
        """Have blocks of so many bytes ready."""
        while self.nbytes + self._block <= nbytes:
            with self._lock:
                self._grow()

    def take(self, count: int) -> list[torch.Tensor]:
        """Blocks of any content, [block] uint8 each; `give` them back."""
        with self._lock:
            while len(self._free) < count:
                self._grow()
            return [self._free.pop() for _ in range(count)]

    def give(self, blocks: list[torch.Tensor]) -> None:
        """Nobody reads or writes these any more."""
        with self._lock:
            self._free.extend(blocks)

    def _grow(self) -> None:
        # torch rounds pinned memory up to powers of two: such a slab wastes less than a block.
        count = max(1, _SLAB // self._block) if self._pinned else 1
        slab = torch.empty(count * self._block, dtype=torch.uint8, pin_memory=self._pinned)
        self._free.extend(slab.split(self._block))
        self._blocks += count
