"""Build an engine from its settings: load the base, size the memory, put the parts together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from adaplex_adapters.errors import StartupError
from adaplex_adapters.spec import Adapter
from adaplex_adapters.store import AdapterStore
from adaplex_server.engine.adapter_source import AdapterSource
from adaplex_server.engine.base_source import obtain_base
from adaplex_server.engine.engine import Engine, Inbox
from adaplex_server.engine.executor import Executor
from adaplex_server.engine.grammars import Grammars
from adaplex_server.engine.host_adapters import AdapterReader
from adaplex_server.engine.host_arena import HostArena
from adaplex_server.engine.image_files import ImageFiles
from adaplex_server.engine.memory import MemoryPlan, ModelBytes, free_bytes, plan_memory
from adaplex_server.engine.messages import EngineInfo, Progress
from adaplex_server.engine.parts import Parts, Send, connect
from adaplex_server.engine.probe import PROBE_TOKENS, VIRTUAL_PROBE_TOKENS, AdapterMemory, LoraDevice
from adaplex_server.engine.sampler import Sampler
from adaplex_server.engine.settings import EngineSettings, with_step_tokens
from adaplex_server.engine.step_batch import build_step
from adaplex_server.kernels.lora_tiles import FEW_TOKENS
from adaplex_server.model.adapter_image import ImageLayout
from adaplex_server.model.adapter_pool import AdapterPool, allocate_pool, bytes_per_page
from adaplex_server.model.base import Base
from adaplex_server.model.config import ModelConfig, read_config
from adaplex_server.model.decode_graphs import DecodeGraphs
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.families import base_shape
from adaplex_server.model.kv_cache import KvCache
from adaplex_server.model.warm_up import warm_up

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SCORE_BYTES = 128 << 20
"""Logits of scored prompt tokens in one step at most."""
_CAPTURE_SECONDS = 8.0
"""How long the start may spend on decode steps that the first requests would otherwise have to capture."""


def start_engine(settings: EngineSettings, inbox: Inbox, send: Send) -> tuple[Engine, EngineInfo]:
    """The engine, ready to run. Raises StartupError with what to change."""
    torch.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
    device = choose_device(settings.device)
    config = read_config(Path(settings.base), settings.base_name)
    dtype = choose_dtype(settings.dtype, config.dtype, device)
    base, keep = obtain_base(settings, config, dtype, device, lambda text, fraction: send(Progress(text, fraction)))
    store, shape = AdapterStore(Path(settings.store)), base_shape(config)
    images = None
    if device.type == "cuda":
        layout = ImageLayout.of(config, pool_dtype(base.dtype, device))
        images = ImageFiles(Path(settings.store) / "images", layout, store.revisions())
    ready = assemble(settings, base, lambda revision: store.read(revision, shape), inbox, send, images)
    keep()
    return ready


def assemble(
    settings: EngineSettings,
    base: Base,
    read: Callable[[str], Adapter],
    inbox: Inbox,
    send: Send,
    images: ImageFiles | None = None,
) -> tuple[Engine, EngineInfo]:
    """An engine around a loaded base. read: an adapter from the store. images: where adapters are kept laid out."""
    device = base.device
    settings = with_step_tokens(settings, device.type == "cuda")
    sizes = model_bytes(settings, base.config, base.dtype, device)
    plan = plan_memory(settings, sizes, free_bytes(device), device.type == "cuda", PROBE_TOKENS + VIRTUAL_PROBE_TOKENS)
    layout = ImageLayout.of(base.config, pool_dtype(base.dtype, device))
    source = AdapterSource(read, base, layout, _host_arena(settings, layout, device), images, settings.max_head_bytes)
    parts = _build_parts(settings, base, plan, source, inbox, send)
    info = EngineInfo(
        pid=os.getpid(),
        device=device.type,
        dtype=str(base.dtype).removeprefix("torch."),
        base_format=base.format,
        max_context=parts.scheduler.max_context,
        max_rows=parts.scheduler.limits.max_rows,
        max_waiting=settings.max_waiting,
        page_size=settings.page_size,
        total_pages=parts.pool.total,
        base_bytes=base.nbytes(),
        vocab_size=base.config.vocab_size,
    )
    overlap = device.type == "cuda" if settings.overlap is None else settings.overlap
    return Engine(parts, inbox, overlap=overlap), info


def _build_parts(
    settings: EngineSettings,
    base: Base,
    plan: MemoryPlan,
    source: AdapterSource,
    inbox: Inbox,
    send: Send,
) -> Parts:
    config, dtype, device = base.config, base.dtype, base.device
    kv = KvCache.allocate(
        config.num_layers, plan.kv_pages, settings.page_size, config.num_kv_heads, config.head_dim, dtype, device
    )
    adapters: AdapterPool | None = None
    if settings.max_slots:
        adapters = allocate_pool(
            config, plan.adapter_pages, settings.max_slots, plan.pages_per_slot, pool_dtype(dtype, device), device
        )
    eos = frozenset(config.eos_token_ids)
    decoder = Decoder(base, adapters, plan.max_context)
    # A captured step has a row for each token, also of prompts.
    most = max(settings.max_rows, FEW_TOKENS)
    tokens = torch.zeros(most, dtype=torch.int64, device=device)
    graphs: DecodeGraphs | None = None
    if device.type == "cuda":
        assert settings.max_step_tokens is not None
        send(Progress("compiling kernels", 1.0))
        warm_up(decoder, settings.page_size, min(settings.max_step_tokens, plan.max_context))
    if device.type == "cuda" and settings.decode_graphs:
        send(Progress("capturing decode steps", 1.0))
        graphs = DecodeGraphs(decoder, kv, most, plan.max_context, tokens)
        graphs.capture_common(_CAPTURE_SECONDS)
    executor = Executor(
        decoder,
        kv,
        Sampler(eos),
        lambda work: build_step(work, settings.page_size, device),
        tokens,
        graphs,
    )
    memory = AdapterMemory(adapters, source.layout)
    return connect(
        settings,
        plan,
        executor=executor,
        device=lambda pages: LoraDevice(executor, config.vocab_size, pages, memory),
        reads=AdapterReader(source, inbox.put),
        send=send,
        eos=eos,
        vocab_size=config.vocab_size,
        max_scores=max_scores(config),
        grammars=Grammars(Path(settings.base), config.vocab_size, eos, inbox.put),
    )


def _host_arena(settings: EngineSettings, layout: ImageLayout, device: torch.device) -> HostArena:
    """Memory for adapters; for a GPU it is pinned meanwhile, as far as the machine has plenty."""
    arena = HostArena(layout.page_bytes, pinned=device.type == "cuda")
    if device.type == "cuda" and settings.max_slots:
        plenty = int(psutil.virtual_memory().available) // 4
        reserve = min(settings.host_adapter_bytes, plenty)
        threading.Thread(target=arena.reserve, args=(reserve,), name="adapter-memory", daemon=True).start()
    return arena


def model_bytes(settings: EngineSettings, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ModelBytes:
    """What the memory plan depends on. The settings have a number of tokens a step."""
    assert settings.max_step_tokens is not None
    widest = 4 * config.hidden_size + 3 * config.intermediate_size
    logits = (settings.max_rows + max_scores(config)) * config.vocab_size * 4
    return ModelBytes(
        max_context=config.max_context,
        kv_page=KvCache.bytes_per_page(
            config.num_layers, settings.page_size, config.num_kv_heads, config.head_dim, dtype
        ),
        adapter_page=bytes_per_page(config, pool_dtype(dtype, device)),
        step=settings.max_step_tokens * widest * dtype.itemsize + 2 * logits,
    )


def max_scores(config: ModelConfig) -> int:
    """Prompt tokens of one step whose log-probabilities can be told."""
    return max(16, _SCORE_BYTES // (config.vocab_size * 4))


def pool_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of adapter weights on the device: float32 on a CPU, where the arithmetic is float32 and would convert them."""
    return dtype if device.type == "cuda" else torch.float32


def choose_device(wanted: str) -> torch.device:
    """The device that a setting of "auto", "cpu" or "cuda" means here."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise StartupError("device is cuda, and torch sees no CUDA device here; use cpu or auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(wanted: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """The dtype of activations: "auto" is the checkpoint's, but bfloat16 for a float16 one on a CPU."""
    if wanted != "auto":
        return _DTYPES[wanted]
    found = _DTYPES.get(checkpoint)
    if found is None:
        raise StartupError(f"the checkpoint's dtype {checkpoint!r} is not known; set dtype to one of {list(_DTYPES)}")
    return torch.bfloat16 if found is torch.float16 and device.type == "cpu" else found
