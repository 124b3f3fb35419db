"""From the scheduler's work to the tensors of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adaplex_server.engine.row import Work
from adaplex_server.model.batch import NO_ADAPTER, StepBatch
from adaplex_server.model.batch_builder import RowInput, build_batch
from adaplex_server.model.decode_inputs import DecodeRows


def build_step(work: Sequence[Work], page_size: int, device: torch.device) -> StepBatch:
    """The batch of this work; its rows are the works, in their order."""
    return build_batch([_row_input(w, page_size) for w in work], page_size, device)


def decode_rows(work: Sequence[Work]) -> DecodeRows | None:
    """The rows of this work; None if it is more than one token and its logits of each."""
    if any(w.count != 1 or w.logits != 1 for w in work):
        return None
    return DecodeRows(
        tokens=[w.row.tokens[w.start] for w in work],
        positions=[w.start for w in work],
        pages=[w.row.pages for w in work],
        slots=[NO_ADAPTER if w.row.slot is None else w.row.slot for w in work],
    )


def _row_input(work: Work, page_size: int) -> RowInput:
    row, end = work.row, work.start + work.count
    return RowInput(
        tokens=row.tokens[work.start : end],
        start=work.start,
        pages=row.pages[: -(-end // page_size)],
        slot=NO_ADAPTER if row.slot is None else row.slot,
        logits=work.logits,
    )
