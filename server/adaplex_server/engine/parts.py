"""What an engine is made of, and how the parts know each other. Nothing here touches a device or a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from adaplex_server.engine.adapter_slots import AdapterSlots
from adaplex_server.engine.executor import Executor
from adaplex_server.engine.grammars import Grammars
from adaplex_server.engine.host_adapters import HostAdapters, Reads
from adaplex_server.engine.limits import Limits
from adaplex_server.engine.memory import MemoryPlan
from adaplex_server.engine.page_pool import PagePool
from adaplex_server.engine.placement import Placement
from adaplex_server.engine.prefix_cache import PrefixCache
from adaplex_server.engine.residency import AdapterDevice, Residency
from adaplex_server.engine.scheduler import Scheduler
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.kernels.lora_tiles import FEW_TOKENS

Send = Callable[[msgspec.Struct], None]


@dataclass(frozen=True)
class Parts:
    """probe_pages: KV pages that belong to the probe. send: a message to the API process. grammars: None for an
    engine that takes no constraints.
    """

    scheduler: Scheduler
    residency: Residency
    executor: Executor
    pool: PagePool
    cache: PrefixCache
    slots: AdapterSlots
    probe_pages: tuple[int, ...]
    send: Send
    grammars: Grammars | None = None

    def check_integrity(self) -> None:
        """Everything that is owned adds up (tests call it after every step)."""
        self.slots.check_integrity()
        self.cache.check_integrity()
        self.pool.check_integrity([self.probe_pages, self.cache.pages(), *self.scheduler.held_pages()])
        self.scheduler.check_integrity()


def connect(
    settings: EngineSettings,
    plan: MemoryPlan,
    *,
    executor: Executor,
    device: Callable[[list[int]], AdapterDevice],
    reads: Reads,
    send: Send,
    eos: frozenset[int],
    vocab_size: int,
    max_scores: int,
    grammars: Grammars | None = None,
) -> Parts:
    """device: makes the adapter device from the probe's KV pages. reads: has adapters read, which come back as
    `AdapterRead`s in the inbox. max_scores: see `Limits`.
    """
    assert settings.max_step_tokens is not None, "the assembly chooses it"
    pool = PagePool(plan.kv_pages)
    probe_pages = pool.take(plan.probe_pages)
    cache = PrefixCache(pool, settings.page_size, settings.prefix_cache)
    slots = AdapterSlots(settings.max_slots, plan.adapter_pages, plan.pages_per_slot)
    hosts = HostAdapters(settings.host_adapter_bytes, reads)
    placement = Placement(slots, hosts.rank_pages)
    limits = Limits(
        max_rows=min(settings.max_rows, settings.max_step_tokens),
        max_waiting=settings.max_waiting,
        max_wait=settings.max_wait,
        max_step_tokens=settings.max_step_tokens,
        max_context=plan.max_context,
        max_scores=max_scores,
        page_size=settings.page_size,
        vocab_size=vocab_size,
        eos=eos,
        few_tokens=0 if executor.graphs is None else min(executor.graphs.max_rows, FEW_TOKENS),
    )
    scheduler = Scheduler(limits, cache, slots, placement)
    residency = Residency(scheduler, placement, slots, hosts, cache, device(probe_pages), send)
    return Parts(scheduler, residency, executor, pool, cache, slots, tuple(probe_pages), send, grammars)
