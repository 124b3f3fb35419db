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


def decode_rows(work: Sequence[Work], places: Mapping[Row, int], most: int) -> DecodeRows | None:
    """This work with a row for each token: tokens of a prompt are rows of the same pages, each of which sees those
    before it, since all keys and values of a layer are written before any is read. None if it has more than `most`
    tokens, or wants what such a step does not give. places: of rows in the step before, whose tokens feed this one.
    """
    if sum(w.count for w in work) > most or any(w.logits > 1 or w.scores or w.start < w.row.virtual for w in work):
        return None
    rows = DecodeRows([], [], [], [], sources := [])
    for w in work:
        rows.tokens.extend([0] if w.fed else w.row.tokens[w.start : w.start + w.count])
        rows.positions.extend(range(w.start, w.start + w.count))
        rows.pages.extend([w.row.pages] * w.count)
        rows.slots.extend([NO_ADAPTER if w.row.slot is None else w.row.slot] * w.count)
        sources.extend([places[w.row] if w.fed else GIVEN] * w.count)
    return rows


def wanted_rows(work: Sequence[Work]) -> list[int]:
    """Of `decode_rows`, those whose logits are wanted: the last of each work that wants any."""
    ends = np.cumsum([w.count for w in work]).tolist()
    return [end - 1 for end, w in zip(ends, work, strict=True) if w.logits]


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
