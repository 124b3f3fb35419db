"""How much of the device's memory an adapter takes while it is resident."""

from __future__ import annotations

import torch

from adaplex_adapters.spec import Adapter
from adaplex_server.model.adapter_image import page_count
from adaplex_server.model.adapter_pool import bytes_per_page
from adaplex_server.model.config import ModelConfig
from adaplex_server.model.ends import ends_bytes
from adaplex_server.model.kv_cache import KvCache


def device_bytes(adapter: Adapter, config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes with adapters and keys and values in `dtype`. Rank rows, factors and bottlenecks take whole pages over all
    linears, targeted or not; virtual tokens take keys and values once, however many rows share them.
    """
    pages = page_count(adapter, config) * bytes_per_page(config, dtype)
    token = KvCache.bytes_per_page(config.num_layers, 1, config.num_kv_heads, config.head_dim, dtype)
    return pages + token * adapter.spec.virtual_tokens + ends_bytes(adapter, config, dtype)
