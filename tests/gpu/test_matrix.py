"""The sample of docs/matrix.md with the engine on the GPU: every family, format and kind, mixed, is PEFT alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.matrix import Cell, every_cell, run_cell, sample

# The formats whose kernels differ most, on the family that has all kinds.
CELLS = [*sample(), *(cell for cell in every_cell() if cell.family == "llama3" and cell.format in ("nf4", "int8"))]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_rows_of_all_kinds_are_pefts(cell: Cell, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    verdict = run_cell(cell, tmp_path, device="cuda")
    assert verdict.rows == 2 * len(cell.kinds) + 2
