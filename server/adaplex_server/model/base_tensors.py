"""Takes a loaded base apart into a description in plain values and a list of tensors, and puts it together again.

Any tree of our own dataclasses, mappings, tuples and tensors will do, so a format needs no code of its own for this.
What the description names are dataclasses of this package, nothing else; nothing in it is ever run.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

import torch

_PACKAGE = "adaplex_server."


class NotPlain(Exception):
    """Something that cannot be described, or a description that cannot be understood."""


def take_apart(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The description; what it refers to is appended to `tensors`, a tensor that is met again only once."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        for index, known in enumerate(tensors):
            if known is value:
                return {"tensor": index}
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"mapping": [[key, take_apart(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [take_apart(inner, tensors) for inner in value]}
    kind = type(value)
    if not is_dataclass(value) or not kind.__module__.startswith(_PACKAGE) or "<locals>" in kind.__qualname__:
        raise NotPlain(f"a {kind.__module__}.{kind.__qualname__} is not kept")
    parts = {field.name: take_apart(getattr(value, field.name), tensors) for field in fields(value)}
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": parts}


def put_together(given: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """What `take_apart` was given, around these tensors. Raises NotPlain."""
    if not isinstance(given, dict):
        return given
    (kind, inner), *rest = given.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dtype":
        return getattr(torch, inner)
    if kind == "mapping":
        return MappingProxyType({key: put_together(value, tensors) for key, value in inner})
    if kind == "tuple":
        return tuple(put_together(value, tensors) for value in inner)
    if kind != "class" or not rest:
        raise NotPlain(f"{kind!r} is not known")
    values = {name: put_together(value, tensors) for name, value in given["fields"].items()}
    return _class(inner)(**values)


def _class(name: str) -> Any:
    module, _, path = name.partition(":")
    if not module.startswith(_PACKAGE):
        raise NotPlain(f"{name} is not ours")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not is_dataclass(found):
        raise NotPlain(f"{name} is no dataclass")
    return found
