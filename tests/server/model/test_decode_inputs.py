"""What a captured step is given: the same as any other step of these rows, and harmless padding."""

from __future__ import annotations

import random

import torch

from adaplex_server.model.batch_builder import RowInput, build_batch
from adaplex_server.model.decode_inputs import DecodeInputs, DecodeRows, DecodeShape

CPU = torch.device("cpu")
PAGE = 4
SHAPE = DecodeShape(rows=40, context=30, tiles=40, rank_pages=4)


def random_rows(rng: random.Random, count: int) -> DecodeRows:
    positions = [rng.randrange(SHAPE.context) for _ in range(count)]
    return DecodeRows(
        tokens=[rng.randrange(100) for _ in positions],
        positions=positions,
        # A row may hold a page more than it needs now.
        pages=[[rng.randrange(1, 90) for _ in range(at // PAGE + 1 + rng.randrange(2))] for at in positions],
        slots=[rng.randrange(-1, 3) for _ in positions],
    )


def test_steps_that_follow_one_another_leave_nothing_behind() -> None:
    rng = random.Random(0)
    inputs = DecodeInputs(SHAPE, PAGE, CPU)
    for count in [rng.randrange(1, SHAPE.rows + 1) for _ in range(60)]:
        rows = random_rows(rng, count)
        inputs.fill(rows)
        wanted = build_batch(
            [
                RowInput([token], position, pages, slot)
                for token, position, pages, slot in zip(
                    rows.tokens, rows.positions, rows.pages, rows.slots, strict=True
                )
            ],
            PAGE,
            CPU,
        )
        batch = inputs.batch
        for name in (
            "tokens",
            "positions",
            "kv_slots",
            "context_lens",
            "logit_tokens",
        ):
            found, expected = getattr(batch, name), getattr(wanted, name)
            assert found.dtype == expected.dtype and torch.equal(found[:count], expected), name
        assert torch.equal(batch.token_start, torch.arange(SHAPE.rows + 1, dtype=torch.int32))
        for row, position in enumerate(rows.positions):
            needed = position // PAGE + 1
            assert torch.equal(batch.page_table[row, :needed], wanted.page_table[row, :needed])
        assert (batch.kv_slots[count:] == -1).all() and (batch.context_lens[count:] == 1).all()
        assert not batch.page_table[count:, 0].any() and not batch.tokens[count:].any()
        live = inputs.tiles.tiles[inputs.tiles.tiles[:, 1] > 0]
        order = inputs.tiles.order[:count]
        assert sorted(order.tolist()) == list(range(count))
        assert [row for row in live[:, 1].tolist() if row > inputs.tiles.tile_tokens] == []
        assert [slot for _, taken, slot in live.tolist() for _ in range(taken)] == [rows.slots[i] for i in order]
        assert live[:, 0].tolist() == (live[:, 1].cumsum(0) - live[:, 1]).tolist()


def test_a_page_list_that_grows_in_place_is_seen() -> None:
    inputs = DecodeInputs(SHAPE, PAGE, CPU)
    pages = [7]
    inputs.fill(DecodeRows([1], [3], [pages], [-1]))
    pages.append(9)
    inputs.fill(DecodeRows([1], [4], [pages], [-1]))
    assert inputs.batch.kv_slots[0] == 9 * PAGE
    assert inputs.batch.page_table[0, :2].tolist() == [7, 9]
