"""Every kind of adapter on every format of every family, mixed in one batch: see `support.matrix`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from support.matrix import FORMATS, KINDS, Cell, document, every_cell, run_cell, sample
from support.tiny_models import CONFIGS

CELLS = every_cell() if os.environ.get("ADAPLEX_MATRIX") == "full" else sample()
DOCUMENT = Path(__file__).parents[3] / "docs" / "matrix.md"


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_rows_of_all_kinds_are_pefts(cell: Cell, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    verdict = run_cell(cell, tmp_path)
    assert verdict.rows == 2 * len(cell.kinds) + 2


def test_the_sample_has_everything() -> None:
    cells = sample()
    assert {cell.family for cell in cells} == set(CONFIGS)
    assert {cell.format for cell in cells} == set(FORMATS)
    assert {kind for cell in cells for kind in cell.kinds} == set(KINDS)


def test_the_document_says_what_is_run() -> None:
    assert DOCUMENT.read_text() == document(), (
        "write it again: PYTHONPATH=tests python -m support.matrix docs/matrix.md"
    )
