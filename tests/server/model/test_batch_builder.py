"""Rows laid out as one batch."""

from __future__ import annotations

import torch

from adaplex_server.model.batch import NO_ADAPTER
from adaplex_server.model.batch_builder import RowInput, build_batch


def test_prefill_and_decode_side_by_side() -> None:
    rows = [
        RowInput([5, 6, 7], start=3, pages=[9, 2], slot=1, logits=2),
        RowInput([8], start=0, pages=[4]),
        RowInput([1, 2], start=4, pages=[7, 5, 6], slot=0, logits=0),
    ]
    batch = build_batch(rows, 4, torch.device("cpu"))
    assert batch.tokens.tolist() == [5, 6, 7, 8, 1, 2]
    assert batch.positions.tolist() == [3, 4, 5, 0, 4, 5]
    assert batch.kv_slots.tolist() == [9 * 4 + 3, 2 * 4, 2 * 4 + 1, 4 * 4, 5 * 4, 5 * 4 + 1]
    assert batch.token_start.tolist() == [0, 3, 4, 6]
    assert batch.context_lens.tolist() == [6, 1, 6]
    assert batch.page_table.tolist() == [[9, 2, 0], [4, 0, 0], [7, 5, 6]]
    assert batch.logit_tokens.tolist() == [1, 2, 3]
    assert (batch.row_tokens, batch.row_contexts, batch.row_slots) == ((3, 1, 2), (6, 1, 6), (1, NO_ADAPTER, 0))
    assert batch.tokens.dtype == batch.positions.dtype == batch.kv_slots.dtype == torch.int64
    assert batch.page_table.dtype == batch.token_start.dtype == torch.int32
