"""Constraints and tools over gRPC are those of HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

from adaplex_adapters.errors import InvalidRequest
from adaplex_proto.v1 import adaplex_pb2 as pb
from adaplex_server.grpc_api.constraints import constraint_of
from adaplex_server.grpc_api.tool_use import ToolTeller, templated, tool_use
from adaplex_server.http_api.schemas.chat import ChatCompletionRequest
from adaplex_server.http_api.tool_use import tool_use as over_http_use
from adaplex_server.service.tool_formats import ToolFormat
from adaplex_server.vocabulary import Constraint

HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", "arguments")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = pb.Tool(name="weather", description="Of a city", parameters_json=json.dumps(SCHEMA))
CLOCK = pb.Tool(name="clock")
SAID = 'Looking.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def test_constraints_of_all_kinds() -> None:
    told = {
        "json_schema": ('{"type": "string"}', Constraint("json", '{"type": "string"}')),
        "json_object": (pb.AnyObject(), Constraint("json", '{"type":"object"}')),
        "regex": ("[ab]+", Constraint("regex", "[ab]+")),
        "choice": (pb.Choices(texts=["a.", "b"]), Constraint("regex", r"a\.|b")),
        "grammar": ('start: "x"', Constraint("lark", 'start: "x"')),
    }
    assert set(told) == {field.name for field in pb.Constraint.DESCRIPTOR.fields}
    for kind, (value, wanted) in told.items():
        assert constraint_of(pb.GenerateRequest(constraint=pb.Constraint(**{kind: value}))) == wanted  # type: ignore
    assert constraint_of(pb.GenerateRequest()) is None


@pytest.mark.parametrize(
    ("kind", "value", "what"),
    [
        ("json_schema", "{", "must be a JSON schema"),
        ("json_schema", "3", "an object"),
        ("choice", pb.Choices(), "not empty"),
        ("grammar", "root ::= (", "no[t]? a GBNF"),
        (None, None, "none of its kinds"),
    ],
)
def test_bad_constraints_are_told(kind: str | None, value: Any, what: str) -> None:
    constraint = pb.Constraint(**{kind: value}) if kind else pb.Constraint()
    with pytest.raises(InvalidRequest, match=what) as refused:
        constraint_of(pb.GenerateRequest(constraint=constraint))
    assert refused.value.param == "constraint"


def chat(*tools: pb.Tool, **more: Any) -> pb.Chat:
    return pb.Chat(tools=tools, **more)


@pytest.mark.parametrize(
    ("choice", "over_http", "several"),
    [
        (None, "auto", None),
        (pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED), "required", None),
        (pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED), "required", False),
        (pb.ToolChoice(function="clock"), {"type": "function", "function": {"name": "clock"}}, None),
    ],
)
def test_a_choice_means_what_it_means_over_http(choice: Any, over_http: Any, several: bool | None) -> None:
    use = tool_use(chat(WEATHER, CLOCK, tool_choice=choice, parallel_tool_calls=several), HERMES)
    functions = [{"name": "weather", "description": "Of a city", "parameters": SCHEMA}, {"name": "clock"}]
    body = ChatCompletionRequest(
        model="m",
        messages=[{"role": "user", "content": "x"}],  # type: ignore[list-item]
        tools=[{"type": "function", "function": one} for one in functions],  # type: ignore[misc]
        tool_choice=over_http,
        parallel_tool_calls=several,
    )
    assert use is not None and use == over_http_use(body, HERMES)


def test_no_tools_and_tools_that_cannot_be() -> None:
    assert tool_use(chat(), None) is None
    assert tool_use(chat(CLOCK, tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE)), None) is None
    bad = [
        (chat(CLOCK, CLOCK), "of one name"),
        (chat(pb.Tool(name="a b")), "letters"),
        (chat(pb.Tool(name="a", parameters_json="[]")), "an object"),
        (chat(pb.Tool(name="a", parameters_json="{")), "no JSON"),
        (chat(CLOCK, tool_choice=pb.ToolChoice(function="weather")), "not among"),
        (chat(tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED)), "not among"),
        (chat(CLOCK, tool_choice=pb.ToolChoice(mode=9)), "mode 9"),  # type: ignore[arg-type]
    ]
    for asked, what in bad:
        with pytest.raises(InvalidRequest, match=what):
            tool_use(asked, HERMES)
    with pytest.raises(InvalidRequest, match="no tools") as refused:
        tool_use(chat(CLOCK), None)
    assert refused.value.param == "chat.tools"


@pytest.mark.parametrize("size", [1, 3, len(SAID)])
def test_calls_are_told_in_pieces_and_the_text_is_without_them(size: int) -> None:
    use = tool_use(chat(WEATHER), HERMES)
    assert use is not None
    teller = ToolTeller(use)
    deltas = [teller.tell(pb.Delta(text=SAID[at : at + size], token_ids=[1])) for at in range(0, len(SAID), size)]
    calls = [call for delta in deltas for call in delta.tool_calls]
    assert "".join(delta.text for delta in deltas) == "Looking." and teller.called and teller.rest(0) is None
    assert calls[0].name == "weather" and calls[0].id and not any(call.id or call.name for call in calls[1:])
    assert json.loads("".join(call.arguments for call in calls)) == {"city": "Paris"}
    assert all(list(delta.token_ids) == [1] for delta in deltas)


def test_what_looks_like_a_call_and_is_none_stays_text() -> None:
    use = tool_use(chat(WEATHER), HERMES)
    assert use is not None
    teller = ToolTeller(use)
    told, rest = teller.tell(pb.Delta(text="<tool_ca")), teller.rest(2)
    assert not told.text and rest is not None and (rest.text, rest.index) == ("<tool_ca", 2) and not teller.called


def test_results_go_back_into_the_template() -> None:
    call = pb.ToolCall(id="1", name="weather", arguments='{"city": "Paris"}')
    told = templated(pb.ChatMessage(role="assistant", tool_calls=[call]))
    assert told["content"] is None and told["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert templated(pb.ChatMessage(role="tool", content="17", tool_call_id="1")) == {
        "role": "tool",
        "content": "17",
        "tool_call_id": "1",
    }
    assert templated(pb.ChatMessage(role="developer", content="x"))["role"] == "system"
