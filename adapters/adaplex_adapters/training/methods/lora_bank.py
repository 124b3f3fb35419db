"""Several LoRAs on one base, each for rows of its own, in one forward pass: the base multiplies all rows at once.

For rows of adapter k: y = W x + s_k B_k (A_k x). Where all have as many rows, one rank and no dropout, the small
products of all are two batched ones. First weights, names of weights and files are PEFT's, adapter by adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.frozen_base import FrozenBase
from adaplex_adapters.training.fused.adapted import LowRank
from adaplex_adapters.training.methods.adapter import AdapterFiles, ModelInputs
from adaplex_adapters.training.methods.attach import attach_adapter
from adaplex_adapters.training.options import LORA, TrainOptions

_PREFIX, _A, _B = "base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class _Entry:
    """One adapter: its weights by PEFT's names, files as PEFT would write them (of the first weights)."""

    weights: dict[str, torch.nn.Parameter]
    files: AdapterFiles
    scaling: float
    rank: int
    dropout: float


class LoraBank:
    """Owns the weights of all adapters and the hooks in the base, until `detach`. shares: rows of each adapter in the
    forward passes to come, in order; by default all rows are of the adapter that is `chosen`.
    """

    def __init__(self, base: FrozenBase, options: Sequence[TrainOptions]) -> None:
        self._base = base
        self._entries = [_entry(base, given) for given in options]
        self._shares: Sequence[tuple[int, int | None]] = [(0, None)]
        paths = {n.removeprefix(_PREFIX).removesuffix(_A) for e in self._entries for n in e.weights if n.endswith(_A)}
        modules = {path: base.model.get_submodule(path) for path in sorted(paths)}
        self._hooks = [m.register_forward_hook(_BankHook(self, path)) for path, m in modules.items()]

    def adapters(self) -> list[BankedLora]:
        """One for each of the options, in order."""
        return [BankedLora(self, index, self._base.model) for index in range(len(self._entries))]

    def choose(self, index: int) -> None:
        """All rows to come are of this adapter."""
        self._shares = [(index, None)]

    @contextmanager
    def shared(self, shares: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Inside, rows are (adapter, count) after (adapter, count)."""
        before, self._shares = self._shares, shares
        try:
            yield
        finally:
            self._shares = before

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, the base answers alone."""
        with self.shared([]):
            yield

    def detach(self) -> None:
        """Take the hooks out of the base."""
        for hook in self._hooks:
            hook.remove()

    def entry(self, index: int) -> _Entry:
        """An adapter's own."""
        return self._entries[index]

    def shares_of(self, rows: int) -> list[tuple[_Entry, int]]:
        """Whose the rows of the next call are, if it has so many."""
        shares = [(self._entries[k], rows if n is None else n) for k, n in self._shares]
        return [(entry, n) for entry, n in shares if n]


class _BankHook:
    """Adds to a linear's output what the bank's adapters make of its input. Owns nothing."""

    def __init__(self, bank: LoraBank, path: str) -> None:
        self._bank, self._a, self._b = bank, f"{_PREFIX}{path}{_A}", f"{_PREFIX}{path}{_B}"

    def __call__(self, module: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        shares = self._bank.shares_of(len(given[0]))
        if not shares:
            return output
        if len(shares) > 1 and _alike(shares, self._a):
            added = _stacked(given[0], [entry for entry, _ in shares], self._a, self._b)
        else:
            added = _one_by_one(given[0], shares, output, self._a, self._b, module.training)
        return (output + added).to(output.dtype)

    def low_rank(self) -> LowRank | None:
        """What it adds, where that is LoRAs of one kind."""
        shares = self._bank.shares_of(1)
        if not shares:
            return LowRank()
        if not _alike(shares, self._a):
            return None
        a, b = ([entry.weights[name] for entry, _ in shares] for name in (self._a, self._b))
        return LowRank(tuple(a), tuple(b), tuple(entry.scaling for entry, _ in shares))


class BankedLora:
    """One adapter of a bank; a TrainedAdapter while it is chosen."""

    def __init__(self, bank: LoraBank, index: int, causal: Any) -> None:
        self._bank, self._index, self._causal = bank, index, causal

    @property
    def model(self) -> Any:
        return self._causal

    @property
    def causal(self) -> Any:
        return self._causal

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return self._bank.entry(self._index).weights

    def inputs(self, ids: torch.Tensor) -> ModelInputs:
        return ModelInputs({"input_ids": ids})

    def choose(self) -> None:
        """All rows to come are of this adapter."""
        self._bank.choose(self._index)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self._bank.silent():
            yield

    @torch.no_grad()
    def settle(self, dtype: torch.dtype) -> None:
        for parameter in self.trained().values():
            parameter.copy_(parameter.to(dtype))

    def files(self, base_name: str, dtype: torch.dtype) -> AdapterFiles:
        entry = self._bank.entry(self._index)
        tensors = {
            name.replace(".default.", "."): p.detach().to("cpu", dtype).contiguous()
            for name, p in entry.weights.items()
        }
        assert tensors.keys() == entry.files.tensors.keys()
        return replace(entry.files, tensors=tensors)

    def detach(self) -> None:
        """The bank's owner detaches the bank."""


def check_bankable(options: Sequence[TrainOptions]) -> None:
    """Raise InvalidRequest unless adapters with these options can share forward passes."""
    first = options[0]
    for given in options:
        if given.method != LORA or given.dora or given.init not in ("default", "gaussian"):
            raise InvalidRequest(
                "only plain LoRAs (no dora, init default or gaussian) train together", param="together"
            )
        for name in ("accumulation", "precision", "quantize", "double_quant", "upcast_base", "gradient_checkpointing"):
            if getattr(given, name) != getattr(first, name):
                raise InvalidRequest(f"adapters that train together need the same {name}", param=name)


def _entry(base: FrozenBase, options: TrainOptions) -> _Entry:
    """First weights as the seed gives them to an adapter that is trained alone."""
    alone = attach_adapter(base, options)
    try:
        weights = {n: torch.nn.Parameter(p.detach().clone()) for n, p in alone.trained().items()}
        files = alone.files(base.name, torch.bfloat16)
    finally:
        alone.detach()
    scaling = options.lora_alpha / (options.rank**0.5 if options.rslora else options.rank)
    return _Entry(weights, files, scaling, options.rank, options.dropout)


def _alike(shares: Sequence[tuple[_Entry, int]], name: str) -> bool:
    first, count = shares[0]
    return all(e.rank == first.rank and n == count and e.dropout == 0 and name in e.weights for e, n in shares)


def _stacked(x: torch.Tensor, entries: Sequence[_Entry], a_name: str, b_name: str) -> torch.Tensor:
    """x: [adapters * rows, tokens, in] -> [the same, out]."""
    a = torch.stack([entry.weights[a_name] for entry in entries])
    b = torch.stack([entry.weights[b_name] * entry.scaling for entry in entries])
    groups = x.to(a.dtype).reshape(len(entries), -1, x.shape[-1])
    added = torch.bmm(torch.bmm(groups, a.transpose(1, 2)), b.transpose(1, 2))
    return added.reshape(*x.shape[:-1], b.shape[1])


def _one_by_one(
    x: torch.Tensor,
    shares: Sequence[tuple[_Entry, int]],
    output: torch.Tensor,
    a_name: str,
    b_name: str,
    training: bool,
) -> torch.Tensor:
    added = []
    for (entry, _), rows, out in zip(
        shares, x.split([n for _, n in shares]), output.split([n for _, n in shares]), strict=True
    ):
        if a_name in entry.weights:
            a, b = entry.weights[a_name], entry.weights[b_name]
            kept = F.dropout(rows.to(a.dtype), entry.dropout, training)
            added.append(F.linear(F.linear(kept, a), b) * entry.scaling)
        else:
            added.append(torch.zeros_like(out))
    return torch.cat(added)
