"""How much of the device's memory an adapter takes while it is resident."""

from __future__ import annotations

import torch

from adaplex_adapters.spec import Adapter
from adaplex_server.model.adapter_image import pages_of_rank
from adaplex_server.model.adapter_pool import bytes_per_page
from adaplex_server.model.config import ModelConfig
from adaplex_server.model.kv_cache import KvCache


def device_bytes(adapter: Adapter, config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes with adapters and keys and values in `dtype`. Rank rows take whole pages over all linears, targeted or not;
    virtual tokens take keys and values once, however many rows share them.
    """
    ranks = pages_of_rank(adapter.spec.rank) * bytes_per_page(config, dtype)
    token = KvCache.bytes_per_page(config.num_layers, 1, config.num_kv_heads, config.head_dim, dtype)
    modules = adapter.modules.values()
    beside = [
        *(module.magnitude for module in modules if module.magnitude is not None),
        *(scale.vector for scale in adapter.scales.values()),
        *adapter.replaced.values(),
        *(
            tensor
            for one in adapter.bottlenecks.values()
            for tensor in (one.down, one.down_bias, one.up, one.up_bias, one.scaling)
        ),
        *(half for module in modules if module.embedding for half in (module.a, module.b)),
    ]
    return ranks + token * adapter.spec.virtual_tokens + dtype.itemsize * sum(tensor.numel() for tensor in beside)
