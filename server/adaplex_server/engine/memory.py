"""How many KV pages and adapter pages an engine gets, from its settings and from the memory that is free.

Pure arithmetic but for `free_bytes`. Too little is a StartupError with the figures, before anything is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from adaplex_adapters.errors import StartupError
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.model.adapter_pool import RANK_PAGE

_LEAST_CONTEXT = 256
_GIB = 1 << 30
RUNTIME_BYTES = _GIB // 2
"""What CUDA, its libraries and captured steps take beside everything that is planned."""


@dataclass(frozen=True)
class ModelBytes:
    """What the sizes depend on. kv_page, adapter_page: bytes of one page over all layers. step: of the activations and
    logits of the largest step.
    """

    max_context: int
    kv_page: int
    adapter_page: int
    step: int


@dataclass(frozen=True)
class MemoryPlan:
    """kv_pages, adapter_pages: with page 0, nobody's. probe_pages: KV pages that the probe keeps for itself."""

    kv_pages: int
    probe_pages: int
    adapter_pages: int
    pages_per_slot: int
    max_context: int


def plan_memory(settings: EngineSettings, model: ModelBytes, free: int, on_gpu: bool, probe_tokens: int) -> MemoryPlan:
    """`free`: bytes left after the base was loaded."""
    kept = model.step + settings.reserved_bytes + (RUNTIME_BYTES if on_gpu else 0)
    usable = max(0, free - kept)
    wanted_context = min(settings.max_context or model.max_context, model.max_context)
    row_pages = -(-wanted_context // settings.page_size)
    probe_pages = -(-probe_tokens // settings.page_size)
    kv_useful = settings.max_rows * row_pages * model.kv_page
    kv_bytes = settings.kv_bytes
    if kv_bytes is None:
        share = int(usable * (0.70 if on_gpu else 0.20))
        kv_bytes = min(share, kv_useful, usable if on_gpu else max(_GIB, 2 * row_pages * model.kv_page))
    slot_pages = -(-settings.max_rank // RANK_PAGE)
    adapter_bytes = settings.adapter_bytes
    if adapter_bytes is None:
        share = int(usable * (0.20 if on_gpu else 0.10))
        useful = settings.max_slots * slot_pages * model.adapter_page
        adapter_bytes = min(share, useful, usable if on_gpu else max(_GIB // 2, slot_pages * model.adapter_page))
    if kv_bytes + adapter_bytes > usable:
        what = f"KV pages of {_mib(kv_bytes)} and adapters of {_mib(adapter_bytes)} do not fit into {_mib(usable)}"
        raise StartupError(f"{what} that are free beside the base; lower kv_bytes or adapter_bytes, or free memory")
    kv_pages = kv_bytes // model.kv_page
    context = min(wanted_context, (kv_pages - probe_pages) * settings.page_size)
    least = wanted_context if settings.max_context is not None else min(_LEAST_CONTEXT, wanted_context)
    if context < least:
        needed = (-(-least // settings.page_size) + probe_pages) * model.kv_page
        what = f"{_mib(kv_bytes)} of KV memory hold {max(context, 0)} tokens, and {least} tokens need {_mib(needed)}"
        raise StartupError(f"{what}; raise kv_bytes, lower max_context, or free memory")
    adapter_pages = adapter_bytes // model.adapter_page if settings.max_slots else 0
    if settings.max_slots and adapter_pages < 1:
        what = (
            f"{_mib(adapter_bytes)} of adapter memory hold nothing: {RANK_PAGE} ranks take {_mib(model.adapter_page)}"
        )
        raise StartupError(f"{what}; raise adapter_bytes, set max_slots to 0 to serve the base alone, or free memory")
    return MemoryPlan(kv_pages + 1, probe_pages, adapter_pages + 1, min(slot_pages, adapter_pages), context)


def free_bytes(device: torch.device) -> int:
    """Memory that can be allocated now: of the GPU, or of the machine within the limit of its control group."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return min(free, max(0, limit - used)) if limit is not None and used is not None else free


def _cgroup(name: str) -> int | None:
    """A figure of control groups v2; None where there is none, or no limit ("max")."""
    try:
        return int(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):
        return None


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"
