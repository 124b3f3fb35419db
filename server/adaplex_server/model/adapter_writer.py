"""Brings adapter images to the device's pool. On a GPU this happens beside the steps: no step waits for a copy.

There the copies run in a stream of their own, from pinned memory to their places, by the copy engine alone. Nobody
reads the pages meanwhile: a slot that a step in flight reads is pinned, and the engine lets no row begin with a slot
before it has seen the end of its copies. Owns the stream and the copies under way; which slot and pages are whose is
the engine's `AdapterSlots`'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaplex_server.model.adapter_image import AdapterImage, ImageLayout
from adaplex_server.model.adapter_pool import AdapterPool, check_pages, page_rows, rank_pages, write_page, write_slot


@dataclass(frozen=True)
class _Flight:
    """Copies under way. They read what image and small hold, which must not be given to others before."""

    done: torch.cuda.Event
    image: AdapterImage
    small: torch.Tensor


class AdapterWriter:
    """Writes to one pool; called by the engine's thread alone, with the steps' stream as the current one."""

    def __init__(self, pool: AdapterPool, layout: ImageLayout) -> None:
        device = pool.slot_pages.device
        self._pool = pool
        self._layout = layout
        self._flights: dict[int, _Flight] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._small: list[torch.Tensor] = []

    @torch.inference_mode()
    def start(self, slot: int, pages: tuple[int, ...], image: AdapterImage) -> None:
        """Make `pages` the slot's, with the image in them. Raises InvalidAdapter if it does not fit them.

        No step that has not ended may read the slot or the pages. The slot may be used once `landed` says so; until
        then it is not to be started again.
        """
        check_pages(self._pool, pages, image)
        pages = pages[: len(image.pages)]
        if self._stream is None:
            for page, values in zip(pages, image.pages, strict=True):
                write_page(self._pool, self._layout, page, values)
            own = rank_pages(image, pages)
            write_slot(self._pool, slot, own, torch.tensor(own, dtype=torch.int32), image.scaling)
        else:
            self._launch(self._stream, slot, pages, image)

    def landed(self, slot: int) -> bool:
        """Whether the copies that were started for the slot have ended."""
        flight = self._flights.get(slot)
        if flight is not None and flight.done.query():
            del self._flights[slot]
            self._small.append(flight.small)
        return slot not in self._flights

    def wait(self, slot: int) -> None:
        """Return when the slot's copies have ended."""
        if slot in self._flights:
            self._flights[slot].done.synchronize()

    def _launch(self, stream: torch.cuda.Stream, slot: int, pages: tuple[int, ...], image: AdapterImage) -> None:
        from adaplex_server.kernels.gpu.strided_copy import copy_rows

        pool, device = self._pool, self._pool.slot_pages.device
        own = rank_pages(image, pages)
        small = self._fill_small(own, image)
        launched = torch.cuda.current_stream(device).record_event()
        with torch.cuda.stream(stream):
            for page, values in zip(pages, image.pages, strict=True):
                for name, places in page_rows(pool, page):
                    for rows, pinned in zip(places, self._layout.of_linear(values, name), strict=True):
                        copy_rows(rows, pinned)
            on_device = small.to(device, non_blocking=True)
            # The slot may have been cleared in the other stream just now.
            stream.wait_event(launched)
            count = image.scaling.numel()
            scaling = on_device[:count].view(torch.float32).view(image.scaling.shape)
            write_slot(pool, slot, own, on_device[count : count + len(own)], scaling)
            self._flights[slot] = _Flight(stream.record_event(), image, small)

    def _fill_small(self, pages: tuple[int, ...], image: AdapterImage) -> torch.Tensor:
        """Scaling and page numbers as int32 words of pinned memory."""
        count = image.scaling.numel()
        size = count + self._pool.slot_pages.shape[1]
        small = self._small.pop() if self._small else torch.empty(size, dtype=torch.int32, pin_memory=True)
        small[:count] = image.scaling.view(-1).view(torch.int32)
        small[count : count + len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return small
