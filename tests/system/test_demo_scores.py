"""Served answers of the demo adapters score what PEFT's do on the same held-out rows, where the base's do not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from running_server import RunningServer

from adaplex_adapters.training.evaluation import evaluate_local, evaluate_served, load_with_adapter
from adaplex_adapters.training.frozen_base import load_frozen_base
from adaplex_adapters.training.recipe import make_rows

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["itn-en", "date-iso", "tsql-postgres"])
def test_served_answers_score_as_pefts(server: RunningServer, name: str) -> None:
    from adaplex_server.bases.embedded import NAME, ensure_embedded

    spec = importlib.util.spec_from_file_location("recipe", EXAMPLES / name / "recipe.py")
    assert spec and spec.loader
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    rows = make_rows(recipe.RECIPE)[1][:ROWS]
    served = evaluate_served(f"{server.http}/v1", name, rows)
    base = load_with_adapter(load_frozen_base(ensure_embedded(None), NAME), EXAMPLES / name / "adapter")
    local = evaluate_local(base, rows)
    assert served.matched >= ROWS - 2
    assert evaluate_served(f"{server.http}/v1", NAME, rows[:3]).matched <= 1, "the base does not know the task"
    # bfloat16 rounds differently in the two: at most one row may be decided by it.
    assert abs(served.matched - local.matched) <= 1
    assert sum(a.strip() != b.strip() for a, b in zip(served.answers, local.answers, strict=True)) <= 1
