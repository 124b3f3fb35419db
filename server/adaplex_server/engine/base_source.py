"""Where the engine's base comes from: the cache of weights, or else its checkpoint, which then fills the cache."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from adaplex_server.engine.settings import EngineSettings
from adaplex_server.model.base import Base, load_base
from adaplex_server.model.config import ModelConfig
from adaplex_server.model.weight_cache import WeightCache, weight_key

log = logging.getLogger("adaplex.engine")


def obtain_base(
    settings: EngineSettings,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[str, float], None],
) -> tuple[Base, Callable[[], None]]:
    """The base, and what to call once the engine is ready: it caches the weights, in a thread, if they were not.

    Only for a GPU: on a CPU there is little to repack, and weights there would only be copied. Raises StartupError.
    """
    cache = _cache(settings, config, dtype, device)
    began = time.monotonic()
    if cache is not None:
        progress(f"loading {config.name} from the cache", 0.0)
        base = cache.load(config, device)
        if base is not None:
            log.info("the weights came from the cache in %.1f s", time.monotonic() - began)
            return base, lambda: None
    base = load_base(
        Path(settings.base),
        config=config,
        quantize=settings.quantize,
        double_quant=settings.double_quant,
        quant_block=settings.quant_block,
        int8_threshold=settings.int8_threshold,
        dtype=dtype,
        device=device,
        progress=progress,
    )
    log.info("the weights came from the checkpoint in %.1f s", time.monotonic() - began)
    if cache is None:
        return base, lambda: None
    thread = threading.Thread(target=cache.save, args=(base,), name="weight-cache", daemon=True)
    return base, thread.start


def _cache(
    settings: EngineSettings, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> WeightCache | None:
    if settings.weight_cache is None or device.type != "cuda":
        return None
    try:
        quantized = (settings.quantize, settings.double_quant, settings.quant_block, settings.int8_threshold)
        options = (*quantized, str(dtype))
        return WeightCache(Path(settings.weight_cache), weight_key(Path(settings.base), config, options, device))
    except OSError as error:
        log.warning("the cache of weights is not used: %s", error)
        return None
