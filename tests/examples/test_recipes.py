"""The demo tasks: their rows, and the adapters that are kept in the repository."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adaplex_adapters.reader import read_unfitted
from adaplex_adapters.training.recipe import Recipe, make_rows

EXAMPLES = Path(__file__).parents[2] / "examples"
LORAS = ("itn-en", "date-iso", "tsql-postgres")
NAMES = (*LORAS, "past-tense", "language-id")
TASKS = (*LORAS, "cron", "past-tense", "language-id", "spelling-to-sound")
MAX_BYTES = 6_000_000


def load(name: str, file: str = "recipe.py") -> Any:
    spec = importlib.util.spec_from_file_location(f"recipe_{name.replace('-', '_')}", EXAMPLES / name / file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def rows_of(name: str) -> Any:
    """Of a task: the rows to train on, and those that are held out."""
    return make_rows(load(name).RECIPE)


@pytest.fixture(scope="module", params=NAMES)
def recipe(request: pytest.FixtureRequest) -> Iterator[Recipe]:
    yield load(request.param).RECIPE


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_made_from_the_seed_and_no_question_is_on_both_sides(name: str) -> None:
    recipe = load(name).RECIPE
    train, held_out = rows_of(name)
    assert (len(train), len(held_out)) == (recipe.train_rows, recipe.held_out_rows)
    asked = [{row.messages[0].content for row in rows} for rows in (train, held_out)]
    assert len(asked[0]) == len(train) and len(asked[1]) == len(held_out)
    assert not asked[0] & asked[1]
    assert make_rows(recipe) == (train, held_out)


def test_adapters_are_small_valid_and_say_nothing_of_the_machine(recipe: Recipe) -> None:
    folder = EXAMPLES / recipe.name / "adapter"
    adapter = read_unfitted(folder)
    assert adapter.spec.base_model == "smollm2-135m-instruct"
    if recipe.name in LORAS:
        assert adapter.spec.rank == 8 and len(adapter.modules) == 210
    else:
        assert adapter.spec.kind == recipe.options.method and adapter.spec.parameters > 10_000
    assert sum(p.stat().st_size for p in folder.iterdir()) < MAX_BYTES
    assert "/" not in (folder / "adapter_config.json").read_text()


def test_every_cron_line_is_described_by_its_question() -> None:
    from cron_descriptor import get_description

    recipe = load("cron").RECIPE
    _, rows = rows_of("cron")
    for row in rows:
        assert row.messages[0].content == f"{recipe.instruction} {get_description(row.messages[1].content)}"


def test_the_suite_knows_every_task_and_makes_a_table(tmp_path: Path) -> None:
    suite = load("suite", "run.py")
    assert tuple(suite.recipes()) == TASKS
    planned = list(suite.runs(list(TASKS), list(suite.METHODS)))
    assert len(planned) == len(TASKS) + 2 * len(suite.OTHER_METHODS) == len(set(planned))
    for _, method in planned:
        assert suite.options_for(method, 3).seed == 3
    result = {"task": "cron", "method": "prompt_tuning", "parameters": 1000, "steps": 9, "seconds": 5, "base": 0.1}
    shown = suite.table([result | {"adapter": 0.5}])
    assert shown.splitlines()[-1] == "| cron | prompt tuning | 1,000 | 9 | 5 s | 0.100 | 0.500 |"
    assert suite.finished(tmp_path / "none.jsonl") == []


def test_every_date_reads_back_as_the_answer() -> None:
    _, rows = rows_of("date-iso")
    for row in rows:
        date = datetime.date.fromisoformat(row.messages[-1].content)
        numbers = [int(n) for n in re.findall(r"\d+", row.messages[0].content)]
        assert date.year in numbers and date.day in numbers, row


def test_every_spoken_number_becomes_digits() -> None:
    """The answer has digits where the question has number words, and the other words unchanged."""
    _, rows = rows_of("itn-en")
    for row in rows:
        question, answer = (m.content for m in row.messages)
        assert re.search(r"\d", answer), row
        rest = re.sub(r"[$\d.%:]+(st|nd|rd|th)?( [ap]m)?", " ", answer).split()
        assert all(word in question.split() for word in rest), row


def test_postgres_answers_parse_as_postgres() -> None:
    import sqlglot

    _, rows = rows_of("tsql-postgres")
    for row in rows:
        assert sqlglot.parse_one(row.messages[-1].content, read="postgres")
        assert "[" not in row.messages[-1].content and "TOP" not in row.messages[-1].content


def test_written_rows_are_what_serve_train_reads(tmp_path: Path, recipe: Recipe) -> None:
    from adaplex_adapters.training.conversations import Chat, read_examples
    from adaplex_adapters.training.recipe import write_rows

    _, rows = rows_of(recipe.name)
    write_rows(rows[:20], tmp_path / "rows.jsonl")
    back = read_examples(tmp_path / "rows.jsonl")
    assert [r.messages for r in back if isinstance(r, Chat)] == [r.messages for r in rows[:20]]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*NAMES} - {*LORAS}))
def test_the_adapter_answers_where_the_base_does_not(name: str) -> None:
    """A few held-out rows through PEFT; the recipe prints the score on all 200. Those of the LoRAs are in
    `tests/system/test_demo_scores.py`, beside what a server answers.
    """
    from adaplex_adapters.training.evaluation import evaluate_local, load_with_adapter
    from adaplex_adapters.training.frozen_base import load_frozen_base
    from adaplex_server.bases.embedded import NAME, ensure_embedded

    rows = rows_of(name)[1][-6:]
    base = load_frozen_base(ensure_embedded(None), NAME)
    assert evaluate_local(base, rows[:3]).matched <= 1
    # They score .7 and more.
    assert evaluate_local(load_with_adapter(base, EXAMPLES / name / "adapter"), rows).matched >= 3


def test_readmes_tell_the_scores(recipe: Recipe) -> None:
    text = (EXAMPLES / recipe.name / "README.md").read_text(encoding="utf-8")
    assert recipe.instruction in text and "recipe.py" in text and "held-out" in text
    config = json.loads((EXAMPLES / recipe.name / "adapter" / "adapter_config.json").read_text())
    assert recipe.name not in LORAS or config["r"] == recipe.options.rank
