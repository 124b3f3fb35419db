"""One step on the device: batch, forward, choice. Owns the model, the KV pages' contents, the sampler, and the buffer
of chosen tokens.

Everything is launched in one stream and nothing waits but `settle`, so a step may be launched while the one before
runs. Invariants: `forward` of a step comes after `choose` of the one before, whose tokens it reads from the device;
`choose` may depend on all tokens before those that it chooses, so the step before is settled by then; one copy of
token ids a step comes back, behind the step and in front of its event, to pinned memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from adaplex_server.engine.chosen import Chosen
from adaplex_server.engine.page_pool import PagePool
from adaplex_server.engine.row import Outcome, Row, Work
from adaplex_server.engine.sampler import Sampler
from adaplex_server.engine.step_batch import decode_rows, feed, wanted_rows
from adaplex_server.model.batch import StepBatch
from adaplex_server.model.decode_graphs import DecodeGraphs
from adaplex_server.model.kv_cache import KvCache
from adaplex_server.model.upload import upload


class ForwardModel(Protocol):
    """What the engine needs of a model: the logits [L, vocab] float32 of the batch's wanted tokens."""

    def forward(self, batch: StepBatch, kv: KvCache) -> torch.Tensor: ...


BuildBatch = Callable[[Sequence[Work]], StepBatch]


@dataclass(frozen=True)
class Forwarded:
    """A step whose logits are being computed. best: of each row of logits the likeliest token, or -1, where a graph
    tells it. kept: the graph has left these tokens where the next step is fed from, each in its work's place.
    """

    work: Sequence[Work]
    logits: torch.Tensor
    best: torch.Tensor | None = None
    kept: bool = False


@dataclass(frozen=True)
class Launched:
    """A step whose tokens are being chosen. chosen: in host memory, to be read when `done` has passed."""

    work: Sequence[Work]
    chosen: Chosen
    done: torch.cuda.Event | None


class Executor:
    """The one caller of the model. `forward` and `choose` raise torch.OutOfMemoryError when the device has no room.

    tokens: [rows] int64 on the device, what each place of the last step has chosen: always a token id, also for a row
    whose numbers are not finite. graphs: serves the steps of few tokens, where it can; it reads and writes the
    same `tokens`.
    """

    def __init__(
        self,
        model: ForwardModel,
        kv: KvCache,
        sampler: Sampler,
        build: BuildBatch,
        tokens: torch.Tensor,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._model = model
        self._kv = kv
        self._sampler = sampler
        self._build = build
        self._tokens = tokens
        self._places: dict[Row, int] = {}
        self.graphs = graphs

    @torch.inference_mode()
    def forward(self, work: Sequence[Work]) -> Forwarded:
        """Compute the work. Tokens that only the device knows are those of the step that was chosen last."""
        replayed = self._replay(work)
        if replayed is not None:
            return replayed
        batch = self._build(work)
        feed(batch, work, self._places, self._tokens)
        return Forwarded(work, self._model.forward(batch, self._kv))

    @torch.inference_mode()
    def choose(self, step: Forwarded) -> Launched:
        """Choose the step's tokens; all that was chosen before must have been committed to the rows."""
        work = step.work
        if step.best is not None and step.kept and self._sampler.wants_best(work):
            chosen = Chosen(len(work), tuple(range(len(work))), step.best, step.best)
        else:
            chosen = self._sampler(step.logits, work, step.best)
            self._keep(chosen)
        self._places = {work[place].row: place for place in chosen.places}
        chosen = chosen.download()
        if not self._tokens.is_cuda:
            return Launched(work, chosen, None)
        done = torch.cuda.Event()
        done.record()
        return Launched(work, chosen, done)

    def settle(self, step: Launched) -> list[Outcome]:
        """Wait for the step: an outcome for each work."""
        if step.done is not None:
            step.done.synchronize()
        return step.chosen.outcomes()

    def _keep(self, chosen: Chosen) -> None:
        """For the next step to be fed with."""
        if len(chosen.places) == chosen.count:
            self._tokens[: chosen.count] = chosen.ids
        else:
            index = upload(chosen.places, torch.int64, self._tokens.device)
            self._tokens.index_copy_(0, index, chosen.ids)

    def _replay(self, work: Sequence[Work]) -> Forwarded | None:
        if self.graphs is None:
            return None
        rows = decode_rows(work, self._places, self.graphs.max_rows)
        decoded = None if rows is None else self.graphs.run(rows)
        if decoded is None:
            return None
        wanted = wanted_rows(work)
        if len(wanted) == len(decoded.best):
            return Forwarded(work, decoded.logits, decoded.best, kept=True)
        index = upload(wanted, torch.int64, self._tokens.device)
        return Forwarded(work, decoded.logits.index_select(0, index), decoded.best.index_select(0, index))

    @torch.inference_mode()
    def logits(self, work: Sequence[Work]) -> torch.Tensor:
        """Compute the work without choosing tokens: logits [L, vocab] float32."""
        return self._model.forward(self._build(work), self._kv)

    @torch.inference_mode()
    def scrub(self, pool: PagePool) -> None:
        """Zero the pages that failed rows gave back, before anybody else gets them. No step in flight writes them."""
        dirty = pool.dirty()
        if dirty:
            self._kv.scrub(dirty)
            pool.cleaned()

    @torch.inference_mode()
    def clear_pages(self, pages: list[int]) -> None:
        """Zero the contents of these pages."""
        self._kv.scrub(pages)
