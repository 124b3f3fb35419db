"""Adapter images on disk, beside the store: an adapter that was laid out once is read again in one piece.

    <folder>/<layout key>/<revision>     header, then the image's pages, each at a multiple of 4096 bytes

They are a cache: the store stays the only truth. An image is made from content whose SHA-256 was checked, and carries a
checksum (XXH3, 128 bits) of each page and of its header, so that one that was damaged is thrown away and made again.
One thread writes and deletes.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec
import torch
import xxhash

from adaplex_server.model.adapter_image import AdapterImage, ImageLayout

log = logging.getLogger("adaplex.engine")
_MAGIC = b"ADPXIMG1"
_ALIGN = 4096
_THREADS = 4


class _Header(msgspec.Struct, frozen=True):
    """sums: of the pages."""

    revision: str
    rank: int
    given: int
    used: int
    scaling: bytes
    sums: list[bytes]


class ImageFiles:
    """The images of one layout in `folder`. keep: revisions that are stored; images of others, and of other layouts,
    are removed. An OSError while reading or writing is logged: whoever asked goes to the store.
    """

    def __init__(self, folder: Path, layout: ImageLayout, keep: Collection[str]) -> None:
        self._layout = layout
        self._folder = folder / layout.key()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="adapter-pages")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for entry in folder.iterdir():
                if entry != self._folder:
                    shutil.rmtree(entry)
            for name in set(os.listdir(self._folder)) - set(keep):
                (self._folder / name).unlink()
        except OSError as error:
            log.warning("the folder of adapter images cannot be used: %s", error)

    def read(self, revision: str, take: Callable[[int], tuple[torch.Tensor, ...]]) -> AdapterImage | None:
        """The image, its content checked, in pages from `take`; None if there is none that can be used."""
        try:
            descriptor = os.open(self._folder / revision, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            header, at = _read_header(descriptor, revision)
            pages = take(len(header.sums))
            step = _aligned(self._layout.page_bytes)
            places = range(at, at + step * len(pages), step)
            list(self._threads.map(_read_page, [descriptor] * len(pages), pages, places, header.sums))
        except (OSError, ValueError, msgspec.MsgspecError, struct.error) as error:
            log.warning("the image of adapter %s is made again: %s", revision[:12], error)
            self.delete(revision)
            return None
        finally:
            os.close(descriptor)
        scaling = torch.frombuffer(bytearray(header.scaling), dtype=torch.float32).view(self._layout.scalings)
        return AdapterImage(revision, header.rank, header.given, header.used, pages, scaling)

    def write(self, image: AdapterImage) -> None:
        """Keep the image, unless there is one, or it is more than pages (then it is small, or rarely read)."""
        if not image.only_rank_rows:
            return
        path = self._folder / image.revision
        made = path.with_suffix(".new")
        try:
            if path.exists():
                return
            with made.open("wb") as file:
                file.write(_header_of(image))
                for page in image.pages:
                    file.write(_bytes_of(page))
                    file.write(b"\0" * (-file.tell() % _ALIGN))
            os.rename(made, path)
        except OSError as error:
            log.warning("the image of adapter %s is not kept: %s", image.revision[:12], error)
            with suppress(OSError):
                made.unlink(missing_ok=True)

    def delete(self, revision: str) -> None:
        """Keep it no longer."""
        try:
            (self._folder / revision).unlink(missing_ok=True)
        except OSError as error:
            log.warning("the image of adapter %s cannot be removed: %s", revision[:12], error)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _bytes_of(values: torch.Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy().data)


def _header_of(image: AdapterImage) -> bytes:
    sums = [xxhash.xxh3_128_digest(_bytes_of(page)) for page in image.pages]
    scaling = image.scaling.contiguous().numpy().tobytes()
    text = msgspec.msgpack.encode(_Header(image.revision, image.rank, image.given, image.used, scaling, sums))
    head = _MAGIC + struct.pack("<I", len(text)) + xxhash.xxh3_128_digest(text) + text
    return head + b"\0" * (-len(head) % _ALIGN)


def _read_header(descriptor: int, revision: str) -> tuple[_Header, int]:
    """The header, and where the pages begin. Raises ValueError (or what decoding raises) for anything strange."""
    head = os.pread(descriptor, 64 << 10, 0)
    (length,) = struct.unpack_from("<I", head, len(_MAGIC))
    begin = len(_MAGIC) + 4 + 16
    if begin + length > len(head):
        head = os.pread(descriptor, begin + length, 0)
    text = head[begin : begin + length]
    if not head.startswith(_MAGIC) or xxhash.xxh3_128_digest(text) != head[begin - 16 : begin]:
        raise ValueError("its header is damaged")
    header = msgspec.msgpack.decode(text, type=_Header)
    if header.revision != revision:
        raise ValueError(f"it is of {header.revision[:12]}")
    return header, _aligned(begin + length)


def _read_page(descriptor: int, page: torch.Tensor, at: int, wanted: bytes) -> None:
    """In few calls, as each takes Python's lock at its end, for which the engine's thread then waits."""
    into, done = _bytes_of(page), 0
    while done < len(into):
        got = os.preadv(descriptor, [into[done:]], at + done)
        if got == 0:
            raise ValueError("it is truncated")
        done += got
    if xxhash.xxh3_128_digest(into) != wanted:
        raise ValueError("its content is damaged")
