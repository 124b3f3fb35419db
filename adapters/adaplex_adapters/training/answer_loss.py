"""Cross entropy over the answers alone, with the head applied only where something is learned, some rows at a time.

The head of a small model is a fifth of its arithmetic and its logits most of the memory: for SmolLM2 a row of 64
tokens would make 64 x 49152 logits where 12 are learned; for a base with 128,256 tokens, 2048 learned positions make
1 GB of float32 logits, and as much again for their gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    targets = batch.labels[:, 1:].to(device)
    arguments = {**inputs.arguments, **_packing(batch, causal.dtype, device), "use_cache": False}
    whole = any(getattr(causal.config, key, None) not in (None, 1, 1.0) for key in CHANGED_LOGITS)
    found = causal(**arguments).logits if whole else causal.base_model(**arguments).last_hidden_state
    head = torch.nn.Identity() if whole else causal.get_output_embeddings()
    losses = []
    for rows, wanted in zip(
        found[:, inputs.virtual : -1].split(list(shares)), targets.split(list(shares)), strict=True
    ):
        learned = wanted != IGNORED
        losses.append(_head_loss(head, rows[learned], wanted[learned]))
    return losses


def _head_loss(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """hidden: [learned, width]. More than HEAD_ROWS are taken in parts whose logits are made again for the gradient."""
    if len(targets) <= HEAD_ROWS:
        return _cross_entropy(head, hidden, targets)
    parts = [
        checkpoint(_cross_entropy, head, rows, wanted, use_reentrant=False)
        for rows, wanted in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
    ]
    return torch.stack(parts).sum()


def _cross_entropy(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


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
