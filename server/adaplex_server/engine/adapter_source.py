"""Where adapter images come from: a file that holds one ready, or the store's adapter, laid out. For the reader thread.

Owns nothing but the way there; the memory of an image goes back to the arena when nobody holds the image any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from adaplex_adapters.spec import Adapter
from adaplex_server.engine.host_arena import HostArena
from adaplex_server.engine.image_files import ImageFiles
from adaplex_server.model.adapter_image import AdapterImage, ImageLayout, lay_out
from adaplex_server.model.base import Base


class AdapterSource:
    """read: an adapter from the store, its content verified. base: what they are for. files: None where images are not
    kept. most_ends: bytes of an adapter's own embedding and head at most.
    """

    def __init__(
        self,
        read: Callable[[str], Adapter],
        base: Base | None,
        layout: ImageLayout,
        arena: HostArena,
        files: ImageFiles | None = None,
        most_ends: int | None = None,
    ) -> None:
        self.layout = layout
        self._read = read
        self._base = base
        self._arena = arena
        self._files = files
        self._most_ends = most_ends

    def load(self, revision: str) -> AdapterImage:
        """The image of this revision. Raises what the store raises, or InvalidAdapter."""
        taken: list[torch.Tensor] = []

        def take(count: int) -> tuple[torch.Tensor, ...]:
            taken.extend(self._arena.take(count))
            return tuple(block.view(self.layout.dtype) for block in taken)

        try:
            image = None if self._files is None else self._files.read(revision, take)
            if image is None:
                self._arena.give(taken)
                taken = []
                image = lay_out(self._read(revision), self.layout, take, self._base, self._most_ends)
        except BaseException:
            self._arena.give(taken)
            raise
        weakref.finalize(image, self._arena.give, taken).atexit = False
        return image

    def keep(self, image: AdapterImage) -> None:
        """The image has been delivered: keep it for the next time."""
        if self._files is not None:
            self._files.write(image)

    def forget(self, revision: str) -> None:
        """Its content is about to be deleted."""
        if self._files is not None:
            self._files.delete(revision)
