"""The proof of an adapter: every tensor was used, and on a fixed prompt its logits are finite and not the base's.

Owns the pages of the probe, which are never a row's, and the base's own answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adaplex_adapters.errors import InvalidAdapter, StartupError, Unavailable
from adaplex_server.engine.executor import Executor
from adaplex_server.engine.row import Row, Work
from adaplex_server.model.adapter_image import AdapterImage, ImageLayout
from adaplex_server.model.adapter_pool import AdapterPool, clear_slot, place_beside
from adaplex_server.model.adapter_writer import AdapterWriter
from adaplex_server.vocabulary import SamplingParams

PROBE_TOKENS = 8
VIRTUAL_PROBE_TOKENS = 8
"""Of a soft prompt, so many tokens take part in its proof at most."""


def probe_tokens(vocab_size: int) -> list[int]:
    """Different tokens from all over the vocabulary."""
    return [(1 + i * 7919) % vocab_size for i in range(PROBE_TOKENS)]


class AdapterMemory:
    """The device's pool of rank rows as the engine writes to it; pool None where no adapter is served."""

    def __init__(self, pool: AdapterPool | None, layout: ImageLayout) -> None:
        self.page_bytes = layout.page_bytes
        self._pool = pool
        self._writer = None if pool is None else AdapterWriter(pool, layout)

    @property
    def writer(self) -> AdapterWriter:
        """Where copies are begun and waited for."""
        assert self._writer is not None, "a slot was given out where there is none"
        return self._writer

    def place_beside(self, slot: int, pages: tuple[int, ...], image: AdapterImage) -> None:
        """Bring to its slot what the image has beside rank rows."""
        assert self._pool is not None, "a slot was given out where there is none"
        place_beside(self._pool, slot, pages, image)

    def clear(self, slot: int) -> None:
        """Nobody's weights are in the slot any more."""
        assert self._pool is not None, "a slot was given out where there is none"
        clear_slot(self._pool, slot)


class LoraDevice:
    """Writes adapters to the device and proves them there (see `residency.AdapterDevice`).

    pages: KV pages for PROBE_TOKENS and VIRTUAL_PROBE_TOKENS tokens.
    """

    def __init__(
        self,
        executor: Executor,
        vocab_size: int,
        pages: list[int],
        memory: AdapterMemory,
    ) -> None:
        self._executor = executor
        self._tokens = probe_tokens(vocab_size)
        self._pages = pages
        self._memory = memory
        self._virtual: dict[int, int] = {}
        self._base = self._logits(None)
        if not torch.isfinite(self._base).all():
            raise StartupError(
                "the base's logits are not finite on the probe: its checkpoint is damaged or its dtype too narrow"
            )

    def write(self, slot: int, pages: tuple[int, ...], image: AdapterImage) -> None:
        """Begin to bring the adapter to its slot; every tensor must have a place."""
        if image.used != image.given:
            raise InvalidAdapter(f"only {image.used} of the adapter's {image.given} tensors have a place in this base")
        with _out_of_memory_refuses():
            self._memory.writer.start(slot, pages, image)
            self._memory.place_beside(slot, pages, image)
        self._virtual[slot] = 0 if image.soft is None else min(len(image.soft), VIRTUAL_PROBE_TOKENS)

    def landed(self, slot: int) -> bool:
        """Whether all of it is there."""
        return self._memory.writer.landed(slot)

    def wait(self, slot: int) -> None:
        """Return when it is."""
        self._memory.writer.wait(slot)

    def prove(self, slot: int) -> float:
        """The largest absolute difference of the probe's logits from the base's."""
        with _out_of_memory_refuses():
            logits = self._logits(slot)
        if not torch.isfinite(logits).all():
            self._executor.clear_pages(self._pages)
            raise InvalidAdapter("the adapter's logits are not finite on a probe: its weights or scaling are too large")
        difference = float((logits - self._base).abs().max())
        if difference == 0:
            raise InvalidAdapter(
                "the adapter changes nothing: on a probe its logits equal the base's (are its B matrices zero?)"
            )
        return difference

    def clear(self, slot: int) -> None:
        """Nobody's weights are in the slot any more."""
        self._memory.clear(slot)

    def page_bytes(self) -> int:
        """Device bytes of one page of rank rows."""
        return self._memory.page_bytes

    def _logits(self, slot: int | None) -> torch.Tensor:
        """Of the probe's own tokens; before them stand as many virtual ones as there is room for."""
        virtual = 0 if slot is None else self._virtual[slot]
        row = Row(
            id=-1,
            tokens=[*range(-1, -virtual - 1, -1), *self._tokens],
            prompt_length=virtual + len(self._tokens),
            sampling=SamplingParams(max_tokens=1),
            revision=None,
            deadline=None,
            priority=0,
            arrival=0,
            max_tokens=1,
            virtual=virtual,
            pages=self._pages,
            slot=slot,
        )
        count = len(self._tokens)
        return self._executor.logits([Work(row, 0, virtual + count, logits=count, scores=0, samples=False)])


@contextmanager
def _out_of_memory_refuses() -> Iterator[None]:
    """A device without memory refuses this adapter now, and nothing else."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise Unavailable("the device has no memory to load this adapter now", retry_after=5.0) from None
