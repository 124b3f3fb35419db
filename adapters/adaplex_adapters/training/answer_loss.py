"""Cross entropy over the answers alone, with the head applied only where something is learned.

The head of a small model is a fifth of its arithmetic and its logits most of the memory: for SmolLM2 a row of 64
tokens would make 64 x 49152 logits where 12 are learned.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from adaplex_adapters.training.batches import Batch
from adaplex_adapters.training.encoding import IGNORED

CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Config keys of families that change the head's output; for those the model's own forward makes the logits."""


def answer_loss(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """Sum (float32 scalar) of -log p(token) over the batch's learned tokens. model: a transformers causal LM or
    PEFT's wrap of one.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = batch.ids.to(device)
    targets = batch.labels[:, 1:].to(device)
    learned = targets != IGNORED
    if any(getattr(causal.config, key, None) not in (None, 1, 1.0) for key in CHANGED_LOGITS):
        logits = causal(input_ids=ids, use_cache=False).logits[:, :-1][learned]
    else:
        hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = causal.get_output_embeddings()(hidden[:, :-1][learned])
    return F.cross_entropy(logits.float(), targets[learned], reduction="sum")
