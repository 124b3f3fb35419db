"""Answers keep to their constraints, whatever the model would rather say, and nobody beside them notices."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch

from adaplex_server.engine.messages import Cancel, Submit
from adaplex_server.vocabulary import Constraint, SamplingParams
from support.mixed import Traffic, settings_for
from support.tiny_base import make_base, make_tokenizer

WORD = {"type": "string", "maxLength": 6}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": WORD, "b": {"type": "boolean"}}, "required": ["a", "b"]}
    | {"additionalProperties": False},
    {"type": "array", "items": {"enum": ["red", "gré", 3, None]}, "minItems": 1, "maxItems": 4},
    {"anyOf": [{"type": "integer", "minimum": -20, "maximum": 7}, {"const": "none"}]},
    {"$defs": {"leaf": {"type": "object", "properties": {"next": {"$ref": "#/$defs/leaf"}}, "required": []}}}
    | {"$ref": "#/$defs/leaf", "maxProperties": 1},
    {"type": "string", "pattern": "^[a-c]{2,5}-[0-9]{3}$"},
]
SCHEMAS[3]["$defs"]["leaf"]["additionalProperties"] = False
del SCHEMAS[3]["maxProperties"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("constraints")
    tokenizer = make_tokenizer()
    return SimpleNamespace(base=make_base(folder / "base", tokenizer), store=folder / "store", tokenizer=tokenizer)


def traffic(base: Any, **changes: Any) -> Traffic:
    settings = {"quantize": "none", "kv_bytes": 1 << 22, "max_context": 512, "max_rows": 16, "max_slots": 0, **changes}
    return Traffic.start(base, settings_for(base, **settings))[0]


def ask(constraint: Constraint | None, seed: int = 0, **more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 300, "temperature": 1.0, "seed": seed, "constraint": constraint, **more})


def text(base: Any, made: Traffic, row: int) -> str:
    return base.tokenizer.decode([one.token for one in made.tokens.get(row, [])])


def prompt(base: Any, row: int) -> list[int]:
    return base.tokenizer.encode(f"question {row}", add_special_tokens=False)


@pytest.mark.parametrize("overlap", [False, True])
def test_every_answer_of_a_random_model_fulfils_its_schema(base: Any, overlap: bool) -> None:
    made = traffic(base, overlap=overlap)
    schemas = [random.Random(seed).choice(SCHEMAS) for seed in range(40)]
    for row, schema in enumerate(schemas):
        made.submit(Submit(row, prompt(base, row), ask(Constraint("json", json.dumps(schema)), row, logprobs=2)))
    made.settle()
    for row, schema in enumerate(schemas):
        assert made.ends[row].reason == "stop", (schema, made.ends[row], text(base, made, row))
        jsonschema.validate(json.loads(text(base, made, row)), schema)
        # Log-probabilities are the model's own: a token that was forced is as unlikely as it was.
        assert all(one.logprob is not None and one.logprob.logprob < 0 for one in made.tokens[row])


@pytest.mark.parametrize("overlap", [False, True])
def test_rows_beside_constrained_ones_and_preempted_ones_answer_as_alone(base: Any, overlap: bool) -> None:
    """Few pages: rows are preempted and go on where their grammar was."""
    constraints = [None, Constraint("regex", "(ab|cd){8,20}"), Constraint("json", json.dumps(SCHEMAS[1]))]
    few = {"overlap": overlap, "kv_bytes": 14 * 16 * 2 * 2 * 2 * 16 * 4, "max_context": 160}
    asked = [ask(constraints[row % 3], row, max_tokens=60, temperature=(row % 2) * 1.0) for row in range(12)]
    mixed = traffic(base, **few)
    for row, sampling in enumerate(asked):
        mixed.submit(Submit(row, prompt(base, row), sampling))
    mixed.settle()
    assert mixed.engine.stats().preemptions > 0
    for row, sampling in enumerate(asked):
        alone = traffic(base)
        alone.submit(Submit(row, prompt(base, row), sampling))
        alone.settle()
        assert text(base, mixed, row) == text(base, alone, row), row
        assert mixed.ends[row].reason == alone.ends[row].reason


def test_an_end_comes_only_where_the_grammar_accepts_and_min_tokens_does_not_outlast_it(base: Any) -> None:
    made = traffic(base)
    exact = Constraint("regex", "(yes|no){3}")
    made.submit(Submit(0, prompt(base, 0), ask(exact, logit_bias={2: 100.0})))
    made.submit(Submit(1, prompt(base, 1), ask(exact, min_tokens=50)))
    made.submit(Submit(2, prompt(base, 2), ask(Constraint("regex", "a+"), min_tokens=9, logit_bias={2: 100.0})))
    made.submit(Submit(3, prompt(base, 3), ask(Constraint("regex", "a{40}"), max_tokens=7)))
    made.settle()
    assert all(re.fullmatch("(yes|no){3}", text(base, made, row)) for row in (0, 1))
    assert text(base, made, 2) == "a" * 9
    assert (text(base, made, 3), made.ends[3].reason) == ("a" * 7, "length")


def test_a_grammar_that_cannot_be_followed_ends_its_row_alone(base: Any) -> None:
    made = traffic(base)
    made.submit(Submit(0, prompt(base, 0), ask(Constraint("json", '{"$ref": "#"}'))))
    made.submit(Submit(1, prompt(base, 1), ask(Constraint("json", '{"type": "nonsense"}'))))
    made.submit(
        Submit(
            2,
            prompt(base, 2),
            ask(
                Constraint(
                    "regex",
                    "((a{1,100}){1,100}){1,100}b",
                ),
                logit_bias={2: 100.0},
            ),
        )
    )
    made.submit(Submit(3, prompt(base, 3), ask(Constraint("regex", "fine"))))
    made.settle()
    assert [made.ends[row].error for row in (0, 1)] == ["InvalidRequest", "InvalidRequest"]
    assert "cannot keep to its constraint" in made.ends[0].message
    assert "nonsense" in made.ends[1].message
    assert text(base, made, 3) == "fine" and made.ends[3].reason == "stop"


def test_a_row_that_waits_for_its_grammar_can_be_cancelled(base: Any) -> None:
    made = traffic(base)
    made.submit(Submit(0, prompt(base, 0), ask(Constraint("regex", "a{9}"))))
    made.inbox.put(Cancel(0))
    made.submit(Submit(1, prompt(base, 1), ask(Constraint("regex", "b{9}"))))
    made.settle()
    assert made.ends[0].reason == "cancelled" and 0 not in made.tokens
    assert text(base, made, 1) == "b" * 9


def test_a_base_without_an_end_token_takes_no_constraints(base: Any, tmp_path: Path) -> None:
    from adaplex_server.engine.grammars import Grammars, Guided

    done: list[Guided] = []
    grammars = Grammars(base.base, 300, frozenset(), done.append)
    grammars.want(Submit(0, [1], ask(Constraint("regex", "a"))))
    grammars._threads.shutdown(wait=True)
    assert done[0].guide is None and "no end token" in str(done[0].error)
