"""Which steps are replayed, and what is made of a replay's answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from adaplex_server.engine.executor import Executor
from adaplex_server.engine.row import Row, Work, work_on
from adaplex_server.engine.sampler import Sampler
from adaplex_server.engine.step_batch import build_step
from adaplex_server.model.batch import StepBatch
from adaplex_server.model.decode_graphs import Decoded
from adaplex_server.model.decode_inputs import GIVEN, DecodeRows
from adaplex_server.model.kv_cache import KvCache
from adaplex_server.vocabulary import SamplingParams

CPU = torch.device("cpu")
PAGE = 4
VOCAB = 6
EOS = 3
LOGITS = torch.tensor([[0.0, 1, 5, 9, 2, 9], [7, 7, 0, 0, 0, 0], [0, 0, torch.nan, 0, 0, 0]])


class Model:
    """Counts its steps; every token's logits are those of LOGITS[0]."""

    def __init__(self) -> None:
        self.steps = 0

    def forward(self, batch: StepBatch, kv: KvCache) -> torch.Tensor:
        self.steps += 1
        return LOGITS[:1].expand(len(batch.logit_tokens), -1)


class Graphs:
    """Row i has LOGITS[i]; `best` is told apart from their argmax. Refuses more than three rows."""

    max_rows = 4

    def __init__(self) -> None:
        self.seen: list[DecodeRows] = []

    def run(self, rows: DecodeRows) -> Decoded | None:
        if len(rows.tokens) > 3:
            return None
        self.seen.append(rows)
        return Decoded(LOGITS[: len(rows.tokens)], torch.tensor([4, 0, -1])[: len(rows.tokens)])


def executor(graphs: Graphs | None) -> tuple[Executor, Model]:
    model = Model()
    kv = KvCache.allocate(1, 8, PAGE, 1, 4, torch.float32, CPU)
    built = lambda work: build_step(work, PAGE, CPU)  # noqa: E731
    chosen = torch.zeros(8, dtype=torch.int64)
    return Executor(model, kv, Sampler(frozenset({EOS})), built, chosen, graphs), model  # type: ignore[arg-type]


def decoding(count: int, slot: int | None = None, sampling: dict[str, Any] | None = None) -> Work:
    """A row of six tokens that has computed all but the last `count`."""
    chosen = SamplingParams(**{"max_tokens": 9, "temperature": 0.0, **(sampling or {})})
    row = Row(1, [1, 2, 3, 4, 5, 0], 5, chosen, None, None, 0, 0, 9, computed=6 - count, pages=[2, 5], slot=slot)
    return work_on(row, count)


def tokens(made: Executor, work: Sequence[Work]) -> list[int | None]:
    return [None if outcome.failed else outcome.token for outcome in made.settle(made.choose(made.forward(work)))]


def test_greedy_rows_take_the_token_that_the_replay_chose() -> None:
    graphs = Graphs()
    made, model = executor(graphs)
    assert tokens(made, [decoding(1), decoding(1, slot=2), decoding(1)]) == [4, 0, None]
    assert model.steps == 0
    assert graphs.seen == [DecodeRows([0, 0, 0], [5, 5, 5], [[2, 5]] * 3, [-1, 2, -1], [GIVEN] * 3)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"logprobs": 0}, {4}),  # as the replay chose
        ({"temperature": 1e-4}, {3, 5}),
        ({"min_tokens": 5}, {5}),
        ({"logit_bias": {2: 10.0}}, {2}),
        ({"presence_penalty": 1.0}, {3}),
    ],
)
def test_any_other_wish_is_the_samplers_work(sampling: dict[str, Any], expected: set[int]) -> None:
    made, model = executor(Graphs())
    found = tokens(made, [decoding(1, sampling=sampling), decoding(1), decoding(1)])
    assert found[0] in expected and found[1:] == [0, None]
    assert model.steps == 0


def test_a_short_prompt_is_replayed_with_a_row_for_each_token() -> None:
    graphs = Graphs()
    made, model = executor(graphs)
    assert tokens(made, [decoding(2, slot=1), decoding(1)]) == [0, None]
    assert graphs.seen == [DecodeRows([5, 0, 0], [4, 5, 5], [[2, 5]] * 3, [1, 1, -1], [GIVEN] * 3)]
    assert made._tokens[:2].tolist() == [0, 0]  # in the works' places, where the next step looks for them
    part = decoding(3)
    assert tokens(made, [decoding(1), work_on(part.row, 2)]) == [4, None]  # the piece chooses nothing
    assert list(made._places.values()) == [0]
    assert model.steps == 0


def test_steps_with_a_longer_prompt_and_steps_that_fit_no_graph_are_run_by_the_model() -> None:
    graphs = Graphs()
    made, model = executor(graphs)
    assert tokens(made, [decoding(1), decoding(4)]) == [3, 3]
    assert model.steps == 1 and not graphs.seen
    assert tokens(made, [decoding(1)] * 4) == [3] * 4
    assert model.steps == 2
    alone, model = executor(None)
    assert tokens(alone, [decoding(1)]) == [3] and model.steps == 1
