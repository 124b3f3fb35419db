"""What the swap benchmark needs: an engine over a store of random adapters, most of which are not on the device."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from adaplex_adapters.identity import described
from adaplex_adapters.spec import Adapter
from adaplex_adapters.store import AdapterStore
from adaplex_loadtest.engine_bench import random_adapters
from adaplex_server.engine.assembly import assemble, pool_dtype
from adaplex_server.engine.engine import Inbox
from adaplex_server.engine.image_files import ImageFiles
from adaplex_server.engine.messages import AdapterFailed, AdapterLoaded, Cancel, LoadAdapter, StepDone, Submit
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.model.adapter_image import AdapterImage, ImageLayout
from adaplex_server.model.base import Base
from adaplex_server.model.families import base_shape
from adaplex_server.vocabulary import SamplingParams


def fill_store(folder: Path, base: Base, rank: int, count: int) -> tuple[AdapterStore, tuple[str, ...]]:
    """A store of `count` adapters of different content, and their revisions."""
    store, revisions = AdapterStore(folder), []
    (made,) = random_adapters(base_shape(base.config), rank, 1, base.dtype)
    for number in range(count):
        # The scaling enters the revision: enough for another content, and quicker than other weights.
        modules = {path: replace(module, scaling=1.0 + number / 1024) for path, module in made.modules.items()}
        revisions.append(store.commit(described(Adapter(made.spec, modules))))
    return store, tuple(revisions)


class SharedImages(ImageFiles):
    """Image files of few contents under the names of many: name i is content i modulo their number. A thousand adapters
    of an 8B base would fill most disks, and reading one costs the same.
    """

    def __init__(self, folder: Path, layout: ImageLayout, contents: Sequence[str]) -> None:
        super().__init__(folder, layout, contents)
        self._contents = contents

    def content(self, name: str) -> str:
        """The revision that is kept for this name."""
        return self._contents[int(name, 16) % len(self._contents)]

    def read(self, revision: str, take: Callable[[int], tuple[torch.Tensor, ...]]) -> AdapterImage | None:
        """See `ImageFiles`."""
        return super().read(self.content(revision), take)

    def delete(self, revision: str) -> None:
        """Others have the same content."""


def name_of(number: int) -> str:
    """What stands for the revision of adapter `number`."""
    return f"{number:064x}"


class SwapEngine:
    """Owns an engine and tells when its messages come. Names are those of `name_of`."""

    def __init__(self, base: Base, settings: EngineSettings, store: AdapterStore, contents: Sequence[str]) -> None:
        layout = ImageLayout.of(base.config, pool_dtype(base.dtype, base.device))
        images = SharedImages(Path(settings.store) / "images", layout, contents)
        shape = base_shape(base.config)
        self.tokens: list[tuple[float, int]] = []
        self.steps: list[float] = []
        self.ended: list[int] = []
        self.loaded: dict[int, float] = {}
        self._vocab = base.config.vocab_size
        self._inbox: Inbox = queue.SimpleQueue()
        self._calls = self._rows = 0
        self.engine, _ = assemble(
            settings, base, lambda name: store.read(images.content(name), shape), self._inbox, self._receive, images
        )

    def load(self, number: int) -> int:
        """Ask for an adapter; the call's number, under which `loaded` tells when it came."""
        self._calls += 1
        self._inbox.put(LoadAdapter(self._calls, name_of(number)))
        return self._calls

    def submit(self, number: int | None, prompt: int, output: int) -> int:
        """A row of an adapter (None: the base) with its own prompt; its number."""
        self._rows += 1
        tokens = [(self._rows * 7919 + i * 31) % self._vocab for i in range(prompt)]
        sampling = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
        self._inbox.put(Submit(self._rows, tokens, sampling, None if number is None else name_of(number)))
        return self._rows

    def cancel(self, row: int) -> None:
        """End a row now."""
        self._inbox.put(Cancel(row))

    @property
    def idle(self) -> bool:
        """No row runs or waits."""
        scheduler = self.engine.parts.scheduler
        return scheduler.running + scheduler.waiting == 0

    def step(self) -> None:
        """Let the engine do one step; without work it sleeps, as in a server."""
        self.engine.take_messages(wait=False)
        if not self.engine.step():
            time.sleep(0.0002)

    def run_until(self, done: Callable[[], bool], seconds: float = 300.0) -> None:
        """Steps until `done`."""
        end = time.perf_counter() + seconds
        while not done():
            assert time.perf_counter() < end, "the engine does not get on"
            self.step()

    def cold(self, number: int) -> float:
        """Seconds from asking for the adapter, while nothing else happens, until rows may begin with it."""
        began = time.perf_counter()
        call = self.load(number)
        self.run_until(lambda: call in self.loaded)
        return self.loaded[call] - began

    def _receive(self, message: msgspec.Struct) -> None:
        now = time.perf_counter()
        if isinstance(message, AdapterLoaded):
            self.loaded[message.call] = now
        assert not isinstance(message, AdapterFailed), message
        if isinstance(message, StepDone):
            self.steps.append(now)
            self.tokens.extend((now, token.row) for token in message.tokens)
            for end in message.ends:
                assert end.reason in ("length", "cancelled"), f"a row ended with {end.reason}: {end.message}"
                self.ended.append(end.row)
