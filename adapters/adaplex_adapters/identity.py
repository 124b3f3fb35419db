"""The revision of an adapter: SHA-256 over what it does, not over how its files were written.

Normalized content: a canonical JSON text of, sorted by module path, each module's scaling (as float32, in which it is
applied) and each tensor's dtype, shape and SHA-256 of its bytes. Names, key order, dropout, training options, the kind
that it was saved as and the files' layout do not enter it. Hashing the tensors one by one lets several cores share the
work.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from adaplex_adapters.problems import raise_if_any
from adaplex_adapters.safetensors_file import DTYPE_NAMES, tensor_bytes
from adaplex_adapters.spec import Adapter

_PLAIN_SCHEME = "adaplex-adapter-1"
_SCHEME = "adaplex-adapter-2"
# Exponent bits of each dtype, in an integer as wide: all set means infinity or NaN.
_EXPONENT: Mapping[torch.dtype, tuple[type[np.unsignedinteger], int]] = {
    torch.float32: (np.uint32, 0x7F800000),
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
}


def described(adapter: Adapter) -> Adapter:
    """The adapter with its spec filled in from its content; kind and base_model are kept.

    Raises InvalidAdapter when a tensor holds NaN or infinity, for each that does.
    """
    tensors = [tensor for _, tensor in adapter.tensors()]
    trained = len(tensors) - len(adapter.base_copies)
    prompt, prefix = adapter.soft_prompt, adapter.prefix
    spec = replace(
        adapter.spec,
        revision=_revision(adapter),
        rank=max((module.a.shape[0] for module in adapter.modules.values()), default=0),
        targets=_targets(adapter),
        parameters=sum(tensor.numel() for tensor in tensors[:trained]),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        virtual_tokens=prompt.shape[0] if prompt is not None else prefix.shape[2] if prefix is not None else 0,
        bottleneck_size=max((one.down.shape[0] for one in adapter.bottlenecks.values()), default=0),
    )
    return replace(adapter, spec=spec)


def _targets(adapter: Adapter) -> tuple[str, ...]:
    paths = (*adapter.modules, *adapter.scales, *adapter.replaced)
    return tuple(sorted({path.rsplit(".", 1)[-1] for path in paths} | {place for _, place in adapter.bottlenecks}))


def _revision(adapter: Adapter) -> str:
    named = list(adapter.tensors())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda item: digest(item[1]), named))
    raise_if_any(
        [f"The {name} holds NaN or infinity." for (name, _), found in zip(named, digests, strict=True) if found is None]
    )
    stated = {name: _stated(tensor, found) for (name, tensor), found in zip(named, digests, strict=True)}
    text = json.dumps(_content(adapter, stated), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _content(adapter: Adapter, stated: Mapping[str, list[object]]) -> dict[str, Any]:
    """Plain LoRA has the form that it always had, so that revisions stored before there were other kinds stay."""
    modules: list[dict[str, Any]] = [
        {
            "path": path,
            "scaling": float(module.scaling).hex(),
            "a": stated[f"lora_A of {path}"],
            "b": stated[f"lora_B of {path}"],
        }
        for path, module in sorted(adapter.modules.items())
    ]
    if adapter.is_plain_lora:
        return {"scheme": _PLAIN_SCHEME, "kind": "lora", "modules": modules}
    return {
        "scheme": _SCHEME,
        "modules": modules,
        "embeddings": sorted(path for path, module in adapter.modules.items() if module.embedding),
        "sides": {path: scale.on for path, scale in adapter.scales.items()},
        "bottlenecks": [
            [layer, place, one.activation, one.reads] for (layer, place), one in sorted(adapter.bottlenecks.items())
        ],
        "tensors": dict(stated),
    }


def _stated(tensor: torch.Tensor, found: str | None) -> list[object]:
    return [DTYPE_NAMES[tensor.dtype], list(tensor.shape), found]


def digest(tensor: torch.Tensor) -> str | None:
    """SHA-256 of the tensor's bytes; None when a value is not finite."""
    data = tensor_bytes(tensor)
    as_integer, exponent = _EXPONENT[tensor.dtype]
    bits = np.frombuffer(data, dtype=as_integer)
    if bits.size and int((bits & as_integer(exponent)).max()) == exponent:
        return None
    return hashlib.sha256(data).hexdigest()
