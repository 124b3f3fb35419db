"""Brings adapter images to the device's pool. On a GPU this happens beside the steps: no step waits for a copy.

There the copies run in a stream of their own. A page is copied whole from pinned memory into a staging buffer at once,
and from there to its places only after the steps that were launched before: those may still read what the page held.
The engine lets no row begin with a slot before it has seen the end of its copies. Owns the stream, the staging buffers
and the copies under way; which slot and pages are whose is the engine's `AdapterSlots`'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaplex_server.model.adapter_image import AdapterImage, ImageLayout
from adaplex_server.model.adapter_pool import AdapterPool, check_pages, write_page, write_slot

_STAGED_PAGES = 2


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
        self._staging: list[torch.Tensor] = []
        self._small: list[torch.Tensor] = []

    @torch.inference_mode()
    def start(self, slot: int, pages: tuple[int, ...], image: AdapterImage) -> None:
        """Make `pages` the slot's, with the image in them. Raises InvalidAdapter if it does not fit them.

        The slot may be used once `landed` says so; until then it is not to be started again.
        """
        pool, layout = self._pool, self._layout
        check_pages(pool, pages, image.rank)
        pages = pages[: len(image.pages)]
        if self._stream is None:
            for page, values in zip(pages, image.pages, strict=True):
                write_page(pool, layout, page, values)
            write_slot(pool, slot, pages, torch.tensor(pages, dtype=torch.int32), image.scaling)
            return
        small = self._fill_small(pages, image)
        launched = torch.cuda.current_stream(pool.slot_pages.device).record_event()
        with torch.cuda.stream(self._stream):
            on_device = small.to(pool.slot_pages.device, non_blocking=True)
            for number, (page, values) in enumerate(zip(pages, image.pages, strict=True)):
                staged = self._stage(number)
                staged.copy_(values, non_blocking=True)
                if number == 0:
                    self._stream.wait_event(launched)
                write_page(pool, layout, page, staged)
            if not pages:
                self._stream.wait_event(launched)
            count = image.scaling.numel()
            scaling = on_device[:count].view(torch.float32).view(image.scaling.shape)
            write_slot(pool, slot, pages, on_device[count : count + len(pages)], scaling)
            self._flights[slot] = _Flight(self._stream.record_event(), image, small)

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

    def _stage(self, number: int) -> torch.Tensor:
        """Two buffers in turn, each taken again in the stream's own order."""
        at = number % _STAGED_PAGES
        if at == len(self._staging):
            device = self._pool.slot_pages.device
            self._staging.append(torch.empty(self._layout.page_values, dtype=self._layout.dtype, device=device))
        return self._staging[at]

    def _fill_small(self, pages: tuple[int, ...], image: AdapterImage) -> torch.Tensor:
        """Scaling and page numbers as int32 words of pinned memory."""
        count = image.scaling.numel()
        size = count + self._pool.slot_pages.shape[1]
        small = self._small.pop() if self._small else torch.empty(size, dtype=torch.int32, pin_memory=True)
        small[:count] = image.scaling.view(-1).view(torch.int32)
        small[count : count + len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return small
