"""Makes a `StepBatch` out of the rows of a step: everything is laid out on the host and brought to the device in two
copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adaplex_server.model.batch import NO_ADAPTER, StepBatch, VirtualSpan
from adaplex_server.model.upload import upload


@dataclass(frozen=True)
class RowInput:
    """One row's part of a step.

    tokens: at least one. start: position of the first of them, which is how many of the row's tokens are already in
    its pages.
    pages: the row's KV pages in order, enough for start + len(tokens) positions. slot: adapter slot, or NO_ADAPTER.
    logits: of how many of its last tokens the logits are wanted (0: none, as in all but the last chunk of a prompt).
    virtual: how many positions at the row's beginning are a soft prompt's; what `tokens` says of these is not read.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    slot: int = NO_ADAPTER
    logits: int = 1
    virtual: int = 0


def build_batch(rows: Sequence[RowInput], page_size: int, device: torch.device) -> StepBatch:
    """The rows side by side, in the order given. At least one row."""
    counts = tuple(len(row.tokens) for row in rows)
    contexts = tuple(row.start + count for row, count in zip(rows, counts, strict=True))
    token_start = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(counts, out=token_start[1:])
    total = int(token_start[-1])
    # int64 part: tokens, positions, kv_slots, logit_tokens.
    wide = np.empty((3, total), dtype=np.int64)
    wanted: list[np.ndarray] = []
    virtual: list[VirtualSpan] = []
    widest = max(len(row.pages) for row in rows)
    table = np.zeros((len(rows), widest), dtype=np.int32)
    for i, row in enumerate(rows):
        begin, end = int(token_start[i]), int(token_start[i + 1])
        assert counts[i] > 0 and 0 <= row.logits <= counts[i] and len(row.pages) * page_size >= contexts[i], row
        positions = np.arange(row.start, contexts[i])
        table[i, : len(row.pages)] = row.pages
        wide[0, begin:end] = row.tokens
        if row.start < row.virtual:
            span = VirtualSpan(row.slot, begin, min(row.virtual, contexts[i]) - row.start, row.start)
            virtual.append(span)
            wide[0, begin : begin + span.count] = 0
        wide[1, begin:end] = positions
        wide[2, begin:end] = table[i, positions // page_size].astype(np.int64) * page_size + positions % page_size
        wanted.append(np.arange(end - row.logits, end))
    slots = tuple(row.slot for row in rows)
    narrow = np.concatenate(
        (
            token_start,
            contexts,
            table.ravel(),
        )
    ).astype(np.int32)
    longs = upload(np.concatenate((wide.ravel(), *wanted)), torch.int64, device)
    ints = upload(narrow, torch.int32, device)
    starts, context_lens, pages = ints.split([len(rows) + 1, len(rows), table.size])
    return StepBatch(
        tokens=longs[:total],
        positions=longs[total : 2 * total],
        kv_slots=longs[2 * total : 3 * total],
        token_start=starts,
        context_lens=context_lens,
        page_table=pages.view(len(rows), widest),
        logit_tokens=longs[3 * total :],
        row_tokens=counts,
        row_contexts=contexts,
        row_slots=slots,
        virtual=tuple(virtual),
        row_logits=tuple(row.logits for row in rows),
    )
