"""Stands for the captured steps of a GPU around a model that is run on the CPU: the same interface, rows fed from what
the step before chose, likeliest tokens left where the next one looks for them.
"""

from __future__ import annotations

import torch

from adaplex_server.engine.executor import ForwardModel
from adaplex_server.kernels.feed import feed_tokens, likeliest
from adaplex_server.model.batch_builder import RowInput, build_batch
from adaplex_server.model.decode_graphs import Decoded
from adaplex_server.model.decode_inputs import DecodeRows
from adaplex_server.model.kv_cache import KvCache


class StampGraphs:
    """tokens: as in `DecodeGraphs`, at least max_rows of them; of other rows than a step has it may spoil them."""

    def __init__(self, model: ForwardModel, kv: KvCache, max_rows: int, tokens: torch.Tensor) -> None:
        self.max_rows = max_rows
        self.replays = 0
        self.prompts = 0
        self._model = model
        self._kv = kv
        self._tokens = tokens

    def run(self, rows: DecodeRows) -> Decoded | None:
        """One step; None if there are too many rows."""
        if len(rows.tokens) > self.max_rows:
            return None
        self.replays += 1
        self.prompts += len({id(pages) for pages in rows.pages}) < len(rows.pages)
        given = torch.tensor(rows.tokens)
        feed_tokens(given, torch.tensor(rows.sources, dtype=torch.int32), self._tokens)
        size = self._kv.page_size
        inputs = [
            RowInput([token], position, pages[: position // size + 1], slot)
            for token, position, pages, slot in zip(given.tolist(), rows.positions, rows.pages, rows.slots, strict=True)
        ]
        logits = self._model.forward(build_batch(inputs, size, given.device), self._kv)
        count = len(inputs)
        kept, best = torch.empty_like(logits), torch.empty(count, dtype=torch.int64)
        self._tokens[: self.max_rows] = 1
        likeliest(logits, kept, best, self._tokens[:count])
        return Decoded(kept, best)
