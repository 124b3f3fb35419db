"""From the scheduler's work to the tensors of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from adaplex_server.engine.row import Row, Work
from adaplex_server.model.batch import NO_ADAPTER, StepBatch
from adaplex_server.model.batch_builder import RowInput, build_batch
from adaplex_server.model.decode_inputs import GIVEN, DecodeRows
from adaplex_server.model.upload import upload


def build_step(work: Sequence[Work], page_size: int, device: torch.device) -> StepBatch:
    """The batch of this work; its rows are the works, in their order."""
    return build_batch([_row_input(w, page_size) for w in work], page_size, device)


def decode_rows(work: Sequence[Work], places: Mapping[Row, int]) -> DecodeRows | None:
    """The rows of this work; None if it is more than one token and its logits of each. places: of rows in the step
    before, whose tokens feed this one.
    """
    if any(w.count != 1 or w.logits != 1 for w in work):
        return None
    return DecodeRows(
        tokens=[0 if w.fed else w.row.tokens[w.start] for w in work],
        positions=[w.start for w in work],
        pages=[w.row.pages for w in work],
        slots=[NO_ADAPTER if w.row.slot is None else w.row.slot for w in work],
        sources=[places[w.row] if w.fed else GIVEN for w in work],
    )


def feed(batch: StepBatch, work: Sequence[Work], places: Mapping[Row, int], tokens: torch.Tensor) -> None:
    """Put the tokens that only the device knows into the batch. tokens: [rows] int64, what the step before chose."""
    fed = [i for i, w in enumerate(work) if w.fed]
    if not fed:
        return
    begins = np.cumsum([0, *(w.count for w in work)])
    index = upload([[int(begins[i]) for i in fed], [places[work[i].row] for i in fed]], torch.int64, tokens.device)
    batch.tokens.index_copy_(0, index[0], tokens.index_select(0, index[1]))


def _row_input(work: Work, page_size: int) -> RowInput:
    row, end = work.row, work.start + work.count
    return RowInput(
        tokens=[0] if work.fed else row.tokens[work.start : end],
        start=work.start,
        pages=row.pages[: -(-end // page_size)],
        slot=NO_ADAPTER if row.slot is None else row.slot,
        logits=work.logits,
        virtual=row.virtual,
    )
