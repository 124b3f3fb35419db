"""The revision of an adapter: SHA-256 over what it does, not over how its files were written.

Normalized content: a canonical JSON text of the kind and, sorted by module path, each module's scaling (as float32, in
which it is applied) and each tensor's dtype, shape and SHA-256 of its bytes. Names, key order, dropout, training
options and the files' layout do not enter it. Hashing the tensors one by one lets several cores share the work.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from adaplex_adapters.problems import raise_if_any
from adaplex_adapters.safetensors_file import DTYPE_NAMES, tensor_bytes
from adaplex_adapters.spec import LoraModule

_SCHEME = "adaplex-adapter-1"
# Exponent bits of each dtype, in an integer as wide: all set means infinity or NaN.
_EXPONENT: Mapping[torch.dtype, tuple[type[np.unsignedinteger], int]] = {
    torch.float32: (np.uint32, 0x7F800000),
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
}


def revision_of(kind: str, modules: Mapping[str, LoraModule]) -> str:
    """The revision (64 hex digits). Raises InvalidAdapter when a tensor holds NaN or infinity, for each that does."""
    paths = sorted(modules)
    tensors = [tensor for path in paths for tensor in (modules[path].a, modules[path].b)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_digest, tensors))
    names = [f"lora_{half} of {path}" for path in paths for half in "AB"]
    raise_if_any(
        [f"The {name} holds NaN or infinity." for name, digest in zip(names, digests, strict=True) if digest is None]
    )
    content = [
        {
            "path": path,
            "scaling": float(modules[path].scaling).hex(),
            "a": _described(modules[path].a, digests[2 * at]),
            "b": _described(modules[path].b, digests[2 * at + 1]),
        }
        for at, path in enumerate(paths)
    ]
    text = json.dumps({"scheme": _SCHEME, "kind": kind, "modules": content}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _described(tensor: torch.Tensor, digest: str | None) -> list[object]:
    return [DTYPE_NAMES[tensor.dtype], list(tensor.shape), digest]


def _digest(tensor: torch.Tensor) -> str | None:
    """SHA-256 of the tensor's bytes; None when a value is not finite."""
    data = tensor_bytes(tensor)
    as_integer, exponent = _EXPONENT[tensor.dtype]
    bits = np.frombuffer(data, dtype=as_integer)
    if bits.size and int((bits & as_integer(exponent)).max()) == exponent:
        return None
    return hashlib.sha256(data).hexdigest()
