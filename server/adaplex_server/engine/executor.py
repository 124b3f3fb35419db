"""One step on the device: batch, forward, sampling. Owns the model, the KV pages' contents and the sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from adaplex_server.engine.page_pool import PagePool
from adaplex_server.engine.row import Outcome, Work
from adaplex_server.engine.sampler import Sampler
from adaplex_server.engine.step_batch import decode_rows
from adaplex_server.model.batch import StepBatch
from adaplex_server.model.decode_graphs import Decoded, DecodeGraphs
from adaplex_server.model.kv_cache import KvCache


class ForwardModel(Protocol):
    """What the engine needs of a model: the logits [L, vocab] float32 of the batch's wanted tokens."""

    def forward(self, batch: StepBatch, kv: KvCache) -> torch.Tensor: ...


BuildBatch = Callable[[Sequence[Work]], StepBatch]


class Executor:
    """The one caller of the model. Raises torch.OutOfMemoryError when the device has no room for the step.

    graphs: serves the steps in which every row computes one token, where it can.
    """

    def __init__(
        self,
        model: ForwardModel,
        kv: KvCache,
        sampler: Sampler,
        build: BuildBatch,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._model = model
        self._kv = kv
        self._sampler = sampler
        self._build = build
        self.graphs = graphs

    @torch.inference_mode()
    def run(self, work: Sequence[Work]) -> list[Outcome]:
        """Compute the work; an outcome for each."""
        decoded = self._replay(work)
        if decoded is None:
            return self._sampler(self._model.forward(self._build(work), self._kv), work)
        outcomes = self._sampler.take_best(decoded.best, work)
        return self._sampler(decoded.logits, work) if outcomes is None else outcomes

    def _replay(self, work: Sequence[Work]) -> Decoded | None:
        rows = None if self.graphs is None else decode_rows(work)
        return None if self.graphs is None or rows is None else self.graphs.run(rows)

    @torch.inference_mode()
    def logits(self, work: Sequence[Work]) -> torch.Tensor:
        """Compute the work without choosing tokens: logits [L, vocab] float32."""
        return self._model.forward(self._build(work), self._kv)

    @torch.inference_mode()
    def scrub(self, pool: PagePool) -> None:
        """Zero the pages that failed rows gave back, before anybody else gets them."""
        dirty = pool.dirty()
        if dirty:
            self._kv.scrub(dirty)
            pool.cleaned()

    @torch.inference_mode()
    def clear_pages(self, pages: list[int]) -> None:
        """Zero the contents of these pages."""
        self._kv.scrub(pages)
