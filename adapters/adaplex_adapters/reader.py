"""Reading an adapter's folder: from files that nobody trusts to an adapter that fits the base, or a refusal.

Stages, each of which reports all that it finds: the folder's files, config and tensors, each by itself; what they say
together (`kinds`), with the tensors' values; and last the fit to the base. All but the last is independent of the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adaplex_adapters.automaton import WorkBudget
from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.fit import adaptable
from adaplex_adapters.folder import WEIGHT_FILES, open_folder
from adaplex_adapters.identity import described, digest
from adaplex_adapters.kinds.reading import Reading, Source
from adaplex_adapters.kinds.registry import reader_of
from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.peft_fields import CONFIG_FILE
from adaplex_adapters.problems import Gathered, refusal
from adaplex_adapters.spec import Adapter
from adaplex_adapters.strict_json import parse_object

__all__ = ["ReadLimits", "UnfittedAdapter", "read_adapter", "read_any", "read_unfitted"]


@dataclass(frozen=True)
class UnfittedAdapter:
    """An adapter that is whole, and the check against a base that is still to be made."""

    adapter: Adapter
    reading: Reading

    def fitted(self, base: BaseShape) -> Adapter:
        """The adapter with its modules in the order of the forward pass. Raises InvalidAdapter unless it fits."""
        adapter = self.adapter
        if self.reading.cut is not None:
            adapter = described(self.reading.cut(adapter, base))
        self.reading.fit(adapter, base)
        paths = adaptable(base)
        return replace(
            adapter,
            modules={path: adapter.modules[path] for path in paths if path in adapter.modules},
            scales={path: adapter.scales[path] for path in paths if path in adapter.scales},
        )


def read_adapter(folder: Path, base: BaseShape, limits: ReadLimits = ReadLimits()) -> Adapter:  # noqa: B008 (frozen)
    """The adapter in `folder`, its modules in the order of the base's.

    Raises InvalidAdapter (with every problem of the failing stage) when it is refused, NotFound when there is no such
    folder, StorageFailed when the disk fails. Takes the adapter's own size in memory, once.
    """
    return read_any(folder, limits).fitted(base)


def read_unfitted(folder: Path, limits: ReadLimits = ReadLimits()) -> Adapter:  # noqa: B008 (frozen)
    """The adapter in `folder`, checked in every way but against a base; modules sorted by path."""
    return read_any(folder, limits).adapter


def read_any(folder: Path, limits: ReadLimits) -> UnfittedAdapter:
    """The adapter in `folder`, of whatever kind, with its check against a base to be made. Raises as `read_adapter`."""
    source = _source(folder, limits)
    try:
        reading = reader_of(source.fields)(source)
    except InvalidAdapter as error:
        raise refusal([*error.problems, *_not_finite(source.tensors)]) from None
    return UnfittedAdapter(described(reading.adapter), reading)


def _source(folder: Path, limits: ReadLimits) -> Source:
    gathered = Gathered()
    fields = tensors = None
    with open_folder(folder, limits) as opened:
        names, problems = opened.check()
        gathered.add(problems)
        if CONFIG_FILE in names:
            data = gathered.step(opened.read_config)
            fields = gathered.step(parse_object, data, CONFIG_FILE) if data is not None else None
        if weights := next((name for name in names if name in WEIGHT_FILES), None):
            tensors = gathered.step(opened.read_tensors, weights)
    if gathered and tensors is not None:
        gathered.add(_not_finite(tensors))
    gathered.raise_if_any()
    assert fields is not None and tensors is not None
    return Source(fields, tensors, limits, WorkBudget())


def _not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return [f"Tensor {name} holds NaN or infinity." for name, tensor in tensors.items() if digest(tensor) is None]
