"""Cross entropy over the answers alone, with the head applied only where something is learned, some rows at a time.

The head of a small model is a fifth of its arithmetic and its logits most of the memory: for SmolLM2 a row of 64
tokens would make 64 x 49152 logits where 12 are learned; for a base with 128,256 tokens, 2048 learned positions make
1 GB of float32 logits, and as much again for their gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from adaplex_adapters.training.batches import Batch
from adaplex_adapters.training.encoding import IGNORED
from adaplex_adapters.training.methods.adapter import ModelInputs, TrainedAdapter

CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Config keys of families that change the head's output; for those the model's own forward makes the logits."""

HEAD_ROWS = 512
"""Learned positions whose logits exist at one time."""


def answer_loss(adapter: TrainedAdapter, batch: Batch, device: torch.device) -> torch.Tensor:
    """Sum (float32 scalar) of -log p(token) over the batch's learned tokens."""
    return causal_loss(adapter.causal, adapter.inputs(batch.ids.to(device)), batch, device)


def base_loss(causal: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """The same for a causal LM as it stands."""
    return causal_loss(causal, ModelInputs({"input_ids": batch.ids.to(device)}), batch, device)


def causal_loss(causal: Any, inputs: ModelInputs, batch: Batch, device: torch.device) -> torch.Tensor:
    """Sum of -log p over the learned tokens of the batch, whose ids are in `inputs` after `virtual` positions."""
    return causal_losses(causal, inputs, batch, device, [len(batch.ids)])[0]


def causal_losses(
    causal: Any, inputs: ModelInputs, batch: Batch, device: torch.device, shares: Sequence[int]
) -> list[torch.Tensor]:
    """The same for each of several groups of neighbouring rows, `shares` rows each, after one forward pass."""
    found = hidden_states(causal, inputs, _packing(batch, causal.dtype, device))
    places = [place.to(device) for place in learned_places(batch, inputs.virtual, shares)]
    return [place_loss(causal, found, place) for place in places]


@dataclass(frozen=True)
class Places:
    """Where something is learned. index: int64 [n], positions of the model's output, its rows one after the other;
    targets: int64 [n], the token that comes next there (IGNORED: none, which adds nothing).
    """

    index: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> Places:
        """The same on a device."""
        return Places(self.index.to(device, non_blocking=True), self.targets.to(device, non_blocking=True))


def learned_places(batch: Batch, virtual: int, shares: Sequence[int]) -> list[Places]:
    """The places of each group of rows, found on the host, so that a GPU need not be waited for."""
    targets = batch.labels[:, 1:]
    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
    index = rows * (virtual + batch.labels.shape[1]) + virtual + columns
    bounds = torch.tensor([0, *shares]).cumsum(0)
    cuts = torch.searchsorted(rows, bounds).tolist()
    known = targets[rows, columns]
    return [Places(index[a:b], known[a:b]) for a, b in itertools.pairwise(cuts)]


def hidden_states(causal: Any, inputs: ModelInputs, packing: Mapping[str, Any] | None = None) -> torch.Tensor:
    """What the head is applied to, [rows, tokens, width]; of families that change their logits, the logits."""
    arguments = {**inputs.arguments, **(packing or {}), "use_cache": False}
    if _changes_logits(causal):
        logits: torch.Tensor = causal(**arguments).logits
        return logits
    found: torch.Tensor = causal.base_model(**arguments).last_hidden_state
    return found


def place_loss(causal: Any, found: torch.Tensor, places: Places) -> torch.Tensor:
    """Sum of -log p (float32 scalar) at the places of `hidden_states`."""
    head = torch.nn.Identity() if _changes_logits(causal) else causal.get_output_embeddings()
    return _head_loss(head, found.flatten(0, 1).index_select(0, places.index), places.targets)


def _changes_logits(causal: Any) -> bool:
    return any(getattr(causal.config, key, None) not in (None, 1, 1.0) for key in CHANGED_LOGITS)


def _head_loss(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """hidden: [learned, width]. More than HEAD_ROWS are taken in parts whose logits are made again for the gradient."""
    if hidden.is_cuda and type(head) is torch.nn.Linear and head.bias is None and _in_half(hidden, head.weight):
        from adaplex_adapters.training.fused.head import surprise_sum

        found: torch.Tensor = surprise_sum(hidden, head.weight, targets, IGNORED, HEAD_ROWS)
        return found
    if len(targets) <= HEAD_ROWS:
        return _cross_entropy(head, hidden, targets)
    parts = [
        checkpoint(_cross_entropy, head, rows, wanted, use_reentrant=False)
        for rows, wanted in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
    ]
    return torch.stack(parts).sum()


def _cross_entropy(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum", ignore_index=IGNORED)


def _in_half(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether both are bfloat16: in float16 a gradient that is not scaled yet would lose its small values."""
    return hidden.dtype == weight.dtype == torch.bfloat16


def _packing(batch: Batch, dtype: torch.dtype, device: torch.device) -> Mapping[str, Any]:
    """Positions, and a mask [rows, 1, tokens, tokens] that keeps the examples of a packed row apart."""
    if batch.parts is None:
        return {}
    parts = batch.parts.to(device)
    tokens = parts.shape[1]
    seen = (parts[:, :, None] == parts[:, None, :]) & torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
    starts = torch.arange(tokens, device=device).expand_as(parts)
    first = torch.ones_like(parts, dtype=torch.bool)
    first[:, 1:] = parts[:, 1:] != parts[:, :-1]
    positions = starts - torch.where(first, starts, 0).cummax(dim=1).values
    return {"attention_mask": mask[:, None], "position_ids": positions}
