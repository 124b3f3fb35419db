"""Calls in answers of each form: whole, cut anywhere, in strange order; and what only looks like one."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from adaplex_server.engine.grammar import build_matcher, check_constraint
from adaplex_server.service.tool_calls import Argued, Called, Said, ToolCalls
from adaplex_server.service.tool_formats import ToolFormat, recognize
from support.tiny_base import make_tokenizer

HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", "arguments")
LLAMA = ToolFormat("llama3", "", "", "parameters")
MISTRAL = ToolFormat("mistral", "", "", "arguments", 7)
SHOWN = ToolFormat("mistral", "[TOOL_CALLS]", "", "arguments")
A, B = '{"x": "}\\"]", "y": [1, {"z": null}]}', "{}"


def one(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


BOTH = [("f", A), ("g", B)]
ANSWERS: dict[str, tuple[ToolFormat, str, str, list[tuple[str, str]]]] = {
    "hermes": (HERMES, hermes(one("f", A), one("g", B)), "", BOTH),
    "hermes after text": (HERMES, "Let me see. <\n\n" + hermes(one("f", A)), "Let me see. <", BOTH[:1]),
    "hermes, other order": (HERMES, hermes(f'{{"arguments": {B}, "name": "g"}}'), "", BOTH[1:]),
    "hermes, no such tool": (HERMES, hermes(one("h", A)), hermes(one("h", A)), []),
    "hermes, broken": (HERMES, "<tool_call>\nf(1)\n</tool_call>", "<tool_call>\nf(1)\n</tool_call>", []),
    "hermes, text only": (HERMES, "1 < 2, <tool_", "1 < 2, <tool_", []),
    "llama": (LLAMA, one("f", A, "parameters"), "", BOTH[:1]),
    "llama, two": (LLAMA, "\n" + one("f", A, "parameters") + "; " + one("g", B, "parameters"), "", BOTH),
    "llama, text": (LLAMA, 'The call is {"name": "f"}', 'The call is {"name": "f"}', []),
    "llama, other JSON": (LLAMA, '{"answer": 42} is it', '{"answer": 42} is it', []),
    "mistral": (MISTRAL, f"[{one('f', A)}, {one('g', B)}]", "", BOTH),
    "mistral, a list": (MISTRAL, "[1, 2]", "[1, 2]", []),
    "mistral, marker as text": (SHOWN, f"[TOOL_CALLS] [{one('f', A)}]", "", BOTH[:1]),
    "nothing": (MISTRAL, "", "", []),
}


def read(form: ToolFormat, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    calls = ToolCalls(form, {"f", "g"})
    said, found = "", []
    for piece in [*(one for text in pieces for one in calls.push(text)), *calls.finish()]:
        if isinstance(piece, Said):
            said += piece.text
        elif isinstance(piece, Called):
            assert piece.number == len(found)
            found.append((piece.name, ""))
        elif isinstance(piece, Argued):
            found[piece.number] = (found[piece.number][0], found[piece.number][1] + piece.text)
    assert calls.calls == len(found)
    return said, found


@pytest.mark.parametrize(("form", "answer", "said", "calls"), ANSWERS.values(), ids=ANSWERS)
def test_calls_are_found_however_the_answer_is_cut(
    form: ToolFormat, answer: str, said: str, calls: list[tuple[str, str]]
) -> None:
    assert read(form, [answer]) == (said, calls)
    assert read(form, list(answer)) == (said, calls)
    rng = random.Random(0)
    for _ in range(30):
        cuts = sorted(rng.choices(range(len(answer) + 1), k=4))
        assert read(form, [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]) == (said, calls)


def test_arguments_are_told_while_they_come() -> None:
    calls = ToolCalls(HERMES, {"f"})
    pieces = calls.push('<tool_call>{"name": "f", "arguments": {"city": "Par')
    assert pieces == [Called(0, "f"), Argued(0, '{"city": "Par')]
    assert calls.push('is"}}</tool_call>') == [Argued(0, 'is"}')]


TEMPLATES = {
    "hermes": ("{{ tools }} <tool_call>\n{}", HERMES),
    "llama3": ('{{ tools }} {"name": function name, "parameters": dictionary of argument name}', LLAMA),
    "mistral": ("{{ tools }} [TOOL_CALLS]", MISTRAL),
    "xml": ("{{ tools }} <tool_call><function=f>", None),
    "new mistral": ("{{ tools }} [TOOL_CALLS]f[ARGS]{}", None),
    "none": ("{{ messages }}", None),
}


@pytest.mark.parametrize(("template", "form"), TEMPLATES.values(), ids=TEMPLATES)
def test_formats_are_known_from_the_template(template: str, form: ToolFormat | None) -> None:
    assert recognize(template, {"[TOOL_CALLS]": 7}) == form


TOOLS: list[dict[str, Any]] = [
    {
        "name": "f",
        "parameters": {
            "$defs": {"unit": {"enum": ["C", "F"]}},
            "type": "object",
            "properties": {"unit": {"$ref": "#/$defs/unit"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["unit", "days"],
            "additionalProperties": False,
        },
    },
    {"name": "g", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("form", [HERMES, LLAMA, ToolFormat("mistral", "", "", "arguments", 1)], ids=lambda f: f.name)
def test_a_forced_answer_is_calls_that_fit_the_tools(form: ToolFormat, several: bool) -> None:
    """Whatever is chosen among the allowed tokens."""
    tokenizer = make_tokenizer()
    made = LLTokenizer(tokenizer.backend_tokenizer.to_str(), n_vocab=len(tokenizer), eos_token=2)
    constraint = form.constraint(TOOLS, several=several)
    check_constraint(constraint)
    schemas = {tool["name"]: tool["parameters"] for tool in TOOLS}
    found = set()
    for seed in range(15):
        _, calls = read(form, [tokenizer.decode(walk(build_matcher(made, constraint), seed), skip_special_tokens=True)])
        assert len(calls) == 1 or (several and calls)
        for name, arguments in calls:
            found.add(name)
            jsonschema.validate(json.loads(arguments), schemas[name])
    assert found == {"f", "g"}


def walk(matcher: LLMatcher, seed: int) -> list[int]:
    rng, ids = random.Random(seed), []
    while not matcher.is_stopped():
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(mask.bit_length()) if mask >> token & 1]
        assert allowed, matcher.get_error()
        ids.append(2 if 2 in allowed else rng.choice(allowed))
        assert matcher.consume_token(ids[-1]), matcher.get_error()
    return ids
