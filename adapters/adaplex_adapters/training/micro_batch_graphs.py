"""Small micro-batches as CUDA graphs: forward and backward pass of one shape are recorded once and replayed, since the
host cannot launch their thousands of kernels as fast as a GPU runs them.

Batches are padded to few shapes. The first batch of a shape runs launch by launch, which also readies libraries; the
second is recorded. All graphs share one pool of memory, so they never hold more than the largest needs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from adaplex_adapters.training.answer_loss import Places, hidden_states, learned_places, place_loss
from adaplex_adapters.training.batches import Batch
from adaplex_adapters.training.encoding import IGNORED
from adaplex_adapters.training.fused.decoder import fused_decoder
from adaplex_adapters.training.methods.adapter import ModelInputs
from adaplex_adapters.training.options import LORA, TrainOptions
from adaplex_adapters.training.precision import mixed, mixed_dtype

LARGEST = 4096
"""Tokens of a micro-batch beyond which the GPU is the slower of the two."""
MOST_GRAPHS = 32
_LENGTH_STEP, _PLACES_STEP = 32, 64


class SteadyGradients:
    """Owns gradients that stay where they are, for graphs to add to: set to zero between steps, never let go of."""

    def __init__(self, trained: Sequence[torch.nn.Parameter]) -> None:
        self._all = [torch.zeros_like(parameter) for parameter in trained]
        for parameter, gradient in zip(trained, self._all, strict=True):
            parameter.grad = gradient

    def zero(self) -> None:
        """In place."""
        torch._foreach_zero_(self._all)


@dataclass(frozen=True)
class _Inputs:
    """What a pass reads: ids [rows, L]; the places of each group of rows, padded with IGNORED ones; the factors of
    their summed losses, float32 [groups].
    """

    ids: torch.Tensor
    places: tuple[Places, ...]
    factors: torch.Tensor

    @property
    def shape(self) -> Hashable:
        """What a graph is recorded for."""
        return (*self.ids.shape, *(len(place.index) for place in self.places))

    def take(self, other: _Inputs) -> None:
        """Copy the values of another of this shape."""
        self.ids.copy_(other.ids, non_blocking=True)
        self.factors.copy_(other.factors, non_blocking=True)
        for mine, theirs in zip(self.places, other.places, strict=True):
            mine.index.copy_(theirs.index, non_blocking=True)
            mine.targets.copy_(theirs.targets, non_blocking=True)

    def to(self, device: torch.device) -> _Inputs:
        """A copy there."""
        places = tuple(place.to(device) for place in self.places)
        return _Inputs(self.ids.to(device), places, self.factors.to(device))


@dataclass(frozen=True)
class _Recorded:
    """A graph, what it reads and the losses that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: _Inputs
    losses: torch.Tensor


class MicroBatchGraphs:
    """Owns the graphs of passes through one causal LM. The weights that are trained have SteadyGradients."""

    def __init__(self, causal: Any, options: TrainOptions, device: torch.device) -> None:
        self._causal, self._options, self._device = causal, options, device
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, _Recorded] = {}
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def learn(
        self, batch: Batch, factors: Sequence[float], shares: Sequence[int] | None = None, whose: Hashable = None
    ) -> torch.Tensor | None:
        """Add the gradients of factor * (summed loss) of each group of rows, and return those losses [groups] float32;
        None for a batch that is better launched.

        shares: rows of each group; all are one group unless given. whose: decides, with the shape, what is recorded.
        """
        if batch.parts is not None or batch.ids.numel() > LARGEST:
            return None
        inputs = _padded(batch, factors, [len(batch.ids)] if shares is None else shares)
        key = (whose, inputs.shape)
        found = self._graphs.get(key)
        if found is None:
            if not self._recordable():
                return None
            if key not in self._seen or len(self._graphs) == MOST_GRAPHS:
                self._seen.add(key)
                return self._launched(inputs.to(self._device))
            found = self._graphs[key] = self._record(inputs.to(self._device))
        found.inputs.take(inputs)
        found.graph.replay()
        return found.losses.clone()

    def _recordable(self) -> bool:
        decoder = fused_decoder(self._causal)
        with mixed(self._options, self._device):
            layers = None if decoder is None else decoder.layers()
        return layers is not None and all(layer.known for layer in layers)

    def _launched(self, inputs: _Inputs) -> torch.Tensor:
        """On the stream of the recordings, so that the gradients' owners in the graph of autograd belong to it."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            losses = self._pass(inputs)
        here.wait_stream(self._stream)
        return losses

    def _record(self, inputs: _Inputs) -> _Recorded:
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            losses = self._pass(inputs)
        return _Recorded(graph, inputs, losses)

    def _pass(self, inputs: _Inputs) -> torch.Tensor:
        with mixed(self._options, self._device):
            found = hidden_states(self._causal, ModelInputs({"input_ids": inputs.ids}))
            losses = torch.stack([place_loss(self._causal, found, place) for place in inputs.places])
        losses = losses * inputs.factors
        losses.sum().backward()
        return losses.detach()


def can_record(causal: Any, options: TrainOptions, device: torch.device) -> bool:
    """Whether passes can be recorded: on a GPU, through a decoder that transformers does not run, for LoRAs without
    dropout, and where the loss is not scaled.
    """
    fits = device.type == "cuda" and options.method == LORA and options.dropout == 0
    return fits and mixed_dtype(options, device) == torch.bfloat16 == causal.dtype and fused_decoder(causal) is not None


def _padded(batch: Batch, factors: Sequence[float], shares: Sequence[int]) -> _Inputs:
    """On the host; rows stay, since padding them would cost what it saves. Padding stands to the right, where no real
    token sees it.
    """
    longer = -batch.ids.shape[1] % _LENGTH_STEP
    ids, labels = F.pad(batch.ids, (0, longer)), F.pad(batch.labels, (0, longer), value=IGNORED)
    groups = learned_places(Batch(ids, labels, batch.learned, batch.tokens), 0, shares)
    return _Inputs(ids, tuple(map(_more, groups)), torch.tensor(factors, dtype=torch.float32))


def _more(places: Places) -> Places:
    count = len(places.index)
    more = max(_PLACES_STEP, -(-count // _PLACES_STEP) * _PLACES_STEP) - count
    return Places(F.pad(places.index, (0, more)), F.pad(places.targets, (0, more), value=IGNORED))
