"""What is refused before the engine hears of it: constraints of which no grammar can be made, and hostile ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.engine.grammar import MAX_CONSTRAINT_CHARS
from adaplex_server.http_api.schemas.formats import ConstraintFields
from adaplex_server.service.constraints import ConstraintCheck
from adaplex_server.vocabulary import Constraint


def wide(levels: int) -> dict[str, Any]:
    """Few words that stand for many."""
    defs: dict[str, Any] = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(levels)}
    defs[f"d{levels}"] = {"type": "object", "properties": {"x": {"type": "string"}}}
    return {"$defs": defs, "allOf": [{"$ref": "#/$defs/d0"}] * 2}


REFUSED = {
    "no type": (Constraint("json", '{"type": "foo"}'), "foo"),
    "unsupported": (Constraint("json", '{"not": {"const": 1}}'), "not"),
    "no json": (Constraint("json", "{"), "JSON"),
    "deep": (Constraint("json", '{"items":' * 2000 + "{}" + "}" * 2000), "recursion"),
    "wide": (Constraint("json", json.dumps(wide(16))), "too large"),
    "huge": (Constraint("json", " " * (MAX_CONSTRAINT_CHARS + 1) + "{}"), "at most"),
    "open group": (Constraint("regex", "(a"), "unclosed group"),
    "deep groups": (Constraint("regex", "(" * 20_000 + "a" + ")" * 20_000), "regular expression"),
    "unknown rule": (Constraint("lark", "start: other"), "unknown name"),
    "deep rule": (Constraint("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000), "nested"),
}


@pytest.mark.timeout(60)  # hostile ones would take hours
@pytest.mark.parametrize(("constraint", "words"), REFUSED.values(), ids=REFUSED)
async def test_bad_constraints_are_bad_requests(constraint: Constraint, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        await ConstraintCheck()(constraint)


async def test_good_constraints_pass_and_are_remembered() -> None:
    check = ConstraintCheck()
    good = Constraint("json", '{"type": "object"}')
    await check(good)
    await check(good)
    assert list(check._passed) == [good]


FIELDS: list[tuple[dict[str, Any], Constraint | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, Constraint("json", '{"type":"object"}')),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}, "strict": True}}},
        Constraint("json", '{"a":1}'),
    ),
    ({"structured_outputs": {"choice": ["a.b", "c|d"]}}, Constraint("regex", r"a\.b|c\|d")),
    ({"guided_choice": ["x y"]}, Constraint("regex", r"x\ y")),
    ({"guided_json": '{"type": "null"}'}, Constraint("json", '{"type":"null"}')),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, Constraint("lark", 'start: "a"')),
]


@pytest.mark.parametrize(("fields", "constraint"), FIELDS)
async def test_fields_of_openai_and_vllm_become_one_constraint(
    fields: dict[str, Any], constraint: Constraint | None
) -> None:
    made = ConstraintFields(**fields).constraint
    assert made == constraint
    if made is not None and made.text != '{"a":1}':
        await ConstraintCheck()(made)


async def test_gbnf_becomes_lark() -> None:
    made = ConstraintFields(guided_grammar='root ::= "a" ("b" | "c")*').constraint
    assert made is not None and made.kind == "lark" and "start" in made.text
    await ConstraintCheck()(made)
