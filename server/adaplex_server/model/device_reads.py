"""Reads a large file straight into memory of the device (or the host), in pieces whose checksums are verified.

Several threads read, each with pinned memory and a stream of its own, so that disk, checksum and copy overlap. Owns
nothing beyond a call.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash

PIECE = 32 << 20
_THREADS = 6


class DamagedPiece(Exception):
    """A piece is shorter than it was, or its bytes have changed."""


def read_pieces(path: Path, begin: int, into: torch.Tensor, sums: Sequence[bytes]) -> None:
    """Fill `into` ([n] uint8) with the file's bytes from `begin` on. sums: XXH3 (128 bits) of each PIECE of them.

    Raises OSError, or DamagedPiece.
    """
    if len(sums) != -(-into.numel() // PIECE):
        raise DamagedPiece("the number of checksums is wrong")
    of_thread = threading.local()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(number: int) -> None:
        if not hasattr(of_thread, "lane"):
            of_thread.lane = _Lane(into.device)
        first = number * PIECE
        of_thread.lane.read(descriptor, begin + first, into[first : first + PIECE], sums[number])

    try:
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(read, range(len(sums))))
        if into.is_cuda:
            torch.cuda.synchronize(into.device)
    finally:
        os.close(descriptor)


class _Lane:
    """One thread's two pinned pieces, filled in turn while the other is copied; nothing of it for a host."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        if self._stream is not None:
            self._pinned = [
                (torch.empty(PIECE, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)
            ]

    def read(self, descriptor: int, at: int, into: torch.Tensor, wanted: bytes) -> None:
        if self._stream is None:
            _fill(descriptor, at, into, wanted)
            return
        buffer, copied = self._pinned[0]
        self._pinned.reverse()
        copied.synchronize()
        _fill(descriptor, at, buffer[: into.numel()], wanted)
        with torch.cuda.stream(self._stream):
            into.copy_(buffer[: into.numel()], non_blocking=True)
            copied.record()


def _fill(descriptor: int, at: int, into: torch.Tensor, wanted: bytes) -> None:
    view = memoryview(into.numpy().data)
    done = 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], at + done)
        if got == 0:
            raise DamagedPiece("it is truncated")
        done += got
    if xxhash.xxh3_128_digest(view) != wanted:
        raise DamagedPiece("its content is damaged")
