"""From the scheduler's work to the tensors of a step: filled on the host, brought to the device in one copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from adaplex_server.engine.row import Work
from adaplex_server.model.adapter_pool import AdapterPool
from adaplex_server.model.batch import NO_ADAPTER, StepBatch


def build_with(
    page_size: int, device: torch.device, adapters: AdapterPool | None
) -> Callable[[Sequence[Work]], StepBatch]:
    """A builder for one engine's page size, device and adapter pool."""
    return lambda work: build_step(work, page_size, device)


def build_step(work: Sequence[Work], page_size: int, device: torch.device) -> StepBatch:
    """The batch of this work; its rows are the works, in their order."""
    counts = np.array([w.count for w in work])
    starts = np.concatenate([[0], np.cumsum(counts)])
    rows = np.repeat(np.arange(len(work)), counts)
    positions = np.arange(starts[-1]) - starts[:-1][rows] + np.array([w.start for w in work])[rows]
    table = np.zeros((len(work), max(-(-(w.start + w.count) // page_size) for w in work)), np.int64)
    for i, w in enumerate(work):
        pages = w.row.pages[: -(-(w.start + w.count) // page_size)]
        table[i, : len(pages)] = pages
    slots = [NO_ADAPTER if w.row.slot is None else w.row.slot for w in work]
    contexts = [w.start + w.count for w in work]
    wide = {
        "tokens": np.array([t for w in work for t in w.row.tokens[w.start : w.start + w.count]]),
        "positions": positions,
        "kv_slots": table[rows, positions // page_size] * page_size + positions % page_size,
        "logit_tokens": np.concatenate(
            [np.arange(end - w.logits, end) for w, end in zip(work, starts[1:], strict=True)]
        ),
    }
    narrow = {
        "row_of_token": rows,
        "token_start": starts,
        "context_lens": np.array(contexts),
        "page_table": table,
        "adapter_slots": np.array(slots)[rows],
    }
    tensors = {name: torch.from_numpy(a.astype(np.int64)).to(device) for name, a in wide.items()}
    tensors |= {name: torch.from_numpy(a.astype(np.int32)).to(device) for name, a in narrow.items()}
    return StepBatch(**tensors, row_tokens=tuple(counts.tolist()), row_contexts=tuple(contexts), row_slots=tuple(slots))
