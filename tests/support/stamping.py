"""A model whose answer tells all that it read: a wrong adapter, a shifted row or a stale page changes the tokens.

Each token's key is (token, stamp of its adapter, position), written to and read back from the paged KV; the logits are
a fixed random vector chosen by a hash over all keys that the row's page table shows. The stamp is read through the
slot's rank pages, as weights would be.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from adaplex_adapters.errors import InvalidAdapter, StorageFailed
from adaplex_server.engine.engine import Engine
from adaplex_server.engine.executor import Executor
from adaplex_server.engine.host_adapters import AdapterRead
from adaplex_server.engine.memory import MemoryPlan
from adaplex_server.engine.messages import AdapterMoved, RowEnd, RowToken, StepDone, StepFigures
from adaplex_server.engine.parts import Parts, connect
from adaplex_server.engine.sampler import Sampler
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.engine.step_batch import build_step
from adaplex_server.model.adapter_image import AdapterImage, pages_of_rank
from adaplex_server.model.batch import StepBatch
from adaplex_server.model.kv_cache import KvCache
from support.stamp_graphs import StampGraphs

VOCAB = 97
EOS = 3
_ANSWERS = 64
POISON = 900
"""Stamps from here on give NaN where the hash is divisible by 5, and write it to the KV."""


def fake_adapter(revision: str, rank: int, nbytes: int = 100) -> AdapterImage:
    """An adapter without weights: the stamp is in its name ("r7" is stamp 7)."""
    pages = [torch.empty(size, dtype=torch.uint8) for size in (nbytes, *[0] * (pages_of_rank(rank) - 1))]
    return AdapterImage(revision, rank, 0, 0, tuple(pages), torch.empty(0))


def stamp_of(revision: str) -> int:
    return int(revision[1:])


@dataclass
class StampDevice:
    """AdapterDevice: slots have pages, pages have stamps. copy_steps: how often `landed` says no; until then the pages
    hold nonsense.
    """

    pages: dict[int, int] = field(default_factory=dict)
    slots: dict[int, tuple[int, ...]] = field(default_factory=dict)
    useless: frozenset[str] = frozenset()
    copy_steps: int = 0
    copying: dict[int, tuple[int, str]] = field(default_factory=dict)
    held: dict[int, str] = field(default_factory=dict)

    def write(self, slot: int, pages: tuple[int, ...], image: AdapterImage) -> None:
        assert slot not in self.copying, "a slot is written twice at once"
        self.slots[slot] = pages
        self.pages.update(dict.fromkeys(pages, -7))
        self.copying[slot] = (self.copy_steps, image.revision)

    def landed(self, slot: int) -> bool:
        if slot in self.copying:
            left, revision = self.copying[slot]
            if left:
                self.copying[slot] = (left - 1, revision)
                return False
            self.wait(slot)
        return True

    def wait(self, slot: int) -> None:
        if slot in self.copying:
            _, revision = self.copying.pop(slot)
            self.pages.update(dict.fromkeys(self.slots[slot], stamp_of(revision)))
            self.held[slot] = revision

    def prove(self, slot: int) -> float:
        if self.held[slot] in self.useless:
            raise InvalidAdapter("the adapter changes nothing")
        return 1.0

    def clear(self, slot: int) -> None:
        for page in self.slots.pop(slot):
            self.pages.pop(page, None)

    def page_bytes(self) -> int:
        return 1000

    def stamp(self, slot: int) -> int:
        if slot < 0:
            return 0
        stamps = {self.pages.get(page, -1) for page in self.slots[slot]}
        return stamps.pop() if len(stamps) == 1 else -2


class StampModel:
    """ForwardModel; see the module."""

    def __init__(self, device: StampDevice) -> None:
        self._device = device
        self._answers = torch.randn(_ANSWERS, VOCAB, generator=torch.Generator().manual_seed(5)) * 2
        self.fail_next = 0
        self.largest_step = 0
        self.steps = 0
        self.tokens: set[int] = {0}

    def forward(self, batch: StepBatch, kv: KvCache) -> torch.Tensor:
        self.steps += 1
        self.tokens |= set(batch.tokens.tolist())
        self.largest_step = max(self.largest_step, len(batch.tokens))
        if self.fail_next:
            self.fail_next -= 1
            raise torch.OutOfMemoryError("pretended")
        stamps = torch.tensor([self._device.stamp(slot) for slot in batch.row_slots])
        row_of_token = torch.repeat_interleave(torch.tensor(batch.row_tokens))
        of_token = stamps[row_of_token]
        keys = torch.stack([batch.tokens, of_token, batch.positions], -1).float()
        kv.keys[0].view(-1, 3)[batch.kv_slots] = keys
        out = torch.empty(len(batch.logit_tokens), VOCAB)
        for i, t in enumerate(batch.logit_tokens.tolist()):
            row, position = int(row_of_token[t]), int(batch.positions[t])
            seen = kv.keys[0][batch.page_table[row].long()].view(-1, 3)[: position + 1].double()
            steps = torch.arange(position + 1, dtype=torch.float64)
            hashed = (seen[:, 0] * (2 * steps + 3) + seen[:, 1] * (5 * steps + 7) + seen[:, 2] * 11).sum()
            if of_token[t] >= POISON and (torch.isnan(hashed) or int(hashed) % 5 == 0):
                kv.keys[0].view(-1, 3)[batch.kv_slots[t]] = torch.nan
                out[i] = torch.nan
            else:
                out[i] = self._answers[int(hashed * 31 + of_token[t]) % _ANSWERS]
        return out


@dataclass
class AskedReads:
    """Reads: what was asked for, for `World.deliver`."""

    asked: list[str] = field(default_factory=list)

    def start(self, revision: str) -> None:
        self.asked.append(revision)

    def forget(self, revision: str) -> None:
        assert revision not in self.asked, "what is dropped is being read"


@dataclass
class World:
    """An engine around the stamping model, with a clock and a store that the test moves by hand."""

    engine: Engine
    parts: Parts
    model: StampModel
    kv: KvCache
    inbox: queue.SimpleQueue
    sent: list[msgspec.Struct]
    asked: list[str]
    ranks: dict[str, int]
    now: list[float]
    tokens: dict[int, list[RowToken]] = field(default_factory=dict)
    ends: dict[int, list[RowEnd]] = field(default_factory=dict)
    other: list[msgspec.Struct] = field(default_factory=list)
    moves: list[AdapterMoved] = field(default_factory=list)
    figures: list[StepFigures] = field(default_factory=list)

    def step(self) -> bool:
        """Handle what has come, make a step, audit everything, and sort what was sent."""
        assert self.engine.take_messages(wait=False)
        busy = self.engine.step()
        self.parts.check_integrity()
        for message in self.sent:
            if isinstance(message, StepDone):
                self.figures += [message.figures] if message.figures is not None else []
                for token in message.tokens:
                    assert token.row not in self.ends, "a token after the end of its row"
                    self.tokens.setdefault(token.row, []).append(token)
                for end in message.ends:
                    self.ends.setdefault(end.row, []).append(end)
            elif isinstance(message, AdapterMoved):
                self.moves.append(message)
            else:
                self.other.append(message)
        self.sent.clear()
        return busy

    def deliver(self) -> None:
        """The store's thread finishes what it was asked for."""
        while self.asked:
            revision = self.asked.pop(0)
            rank = self.ranks.get(revision)
            gone = StorageFailed(f"no {revision} in the store")
            self.inbox.put(AdapterRead(revision, gone if rank is None else fake_adapter(revision, rank)))

    def settle(self, steps: int = 3000) -> None:
        """Until nothing is left to do."""
        for _ in range(steps):
            self.deliver()
            if not self.step() and not self.asked:
                return
        raise AssertionError(f"not idle after {steps} steps: {self.engine.stats()}")

    def text(self, row: int) -> list[int]:
        return [token.token for token in self.tokens.get(row, [])]


def make_world(
    ranks: dict[str, int],
    *,
    kv_pages: int = 64,
    page_size: int = 4,
    slots: int = 3,
    adapter_pages: int = 9,
    context: int = 64,
    max_scores: int = 8,
    useless: frozenset[str] = frozenset(),
    copy_steps: int = 0,
    graph_rows: int = 0,
    **settings: int | bool,
) -> World:
    """ranks: of the adapters in the store. The pools are tiny on purpose. graph_rows: of `StampGraphs`, 0 for none."""
    chosen = EngineSettings(
        base="", store="", base_name="", page_size=page_size, max_slots=slots, **{"max_step_tokens": 16, **settings}
    )
    plan = MemoryPlan(kv_pages + 1, 2, adapter_pages + 1, 4, context)
    device = StampDevice(useless=useless, copy_steps=copy_steps)
    model = StampModel(device)
    kv = KvCache.allocate(1, kv_pages + 1, page_size, 1, 3, torch.float32, torch.device("cpu"))
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    sent: list[msgspec.Struct] = []
    reads = AskedReads()
    now = [0.0]
    build: Callable = lambda work: build_step(work, page_size, torch.device("cpu"))  # noqa: E731
    tokens = torch.zeros(max(chosen.max_rows, graph_rows), dtype=torch.int64)
    graphs: Any = StampGraphs(model, kv, graph_rows, tokens) if graph_rows else None
    parts = connect(
        chosen,
        plan,
        executor=Executor(model, kv, Sampler(frozenset({EOS})), build, tokens, graphs),
        device=lambda pages: device,
        reads=reads,
        send=sent.append,
        eos=frozenset({EOS}),
        vocab_size=VOCAB,
        max_scores=max_scores,
    )
    engine = Engine(parts, inbox, lambda: now[0], overlap=bool(chosen.overlap))
    return World(engine, parts, model, kv, inbox, sent, reads.asked, ranks, now)
