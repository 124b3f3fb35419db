"""Tools over HTTP: what the template and the sampler are told, and how calls come back, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from adaplex_server.service.tool_formats import ToolFormat
from adaplex_server.vocabulary import Delta, Finish, GenerateRequest

HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", "arguments")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SAID = 'Looking.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
USER = [{"role": "user", "content": "Weather in Paris?"}]


@pytest.fixture
def calling(service: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The service's base answers with a call, three characters a delta."""
    service.text.tool_format = HERMES
    service.told_tools = []
    chat = service.text.chat

    def told(messages: Any, *, tools: Any = None) -> list[int]:
        service.told_tools.append((messages, tools))
        return chat([{**message, "content": message["content"] or ""} for message in messages])

    def row(request: GenerateRequest, index: int) -> Iterator[Delta | Finish]:
        for at in range(0, len(SAID), 3):
            yield Delta(index=index, text=SAID[at : at + 3], token_ids=(1,))
        yield Finish(index=index, reason="stop", prompt_tokens=3, completion_tokens=9)

    monkeypatch.setattr(service.text, "chat", told)
    monkeypatch.setattr(service, "_row", row)
    return service


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "alpha", "messages": USER, "tools": [WEATHER], **more})


def test_calls_come_back_and_their_results_go_in(calling: Any, client: openai.OpenAI) -> None:
    choice = ask(client).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Looking."
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    ((_, tools),) = calling.told_tools
    assert tools[0]["function"]["parameters"] == WEATHER["function"]["parameters"]
    result = {"role": "tool", "tool_call_id": call.id, "content": "17 degrees"}
    ask(client, messages=[*USER, choice.message.model_dump(exclude_none=True), result])
    messages, _ = calling.told_tools[-1]
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert messages[2] == result


def test_a_stream_tells_the_same(calling: Any, client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="alpha", messages=USER, tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        whole = stream.get_final_completion().choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content == "Looking."
    assert json.loads(whole.message.tool_calls[0].function.arguments) == {"city": "Paris"}
    chunks = [chunk.choices[0] for chunk in ask(client, stream=True)]
    calls = [call for one in chunks for call in one.delta.tool_calls or ()]
    assert calls[0].id and calls[0].function.name == "weather" and len(calls) > 3
    assert not any(call.id for call in calls[1:])
    assert "".join(call.function.arguments for call in calls) == '{"city": "Paris"}'


def test_a_call_is_forced_by_a_constraint_and_forbidden_by_silence(calling: Any, client: openai.OpenAI) -> None:
    ask(client, tool_choice="required")
    ask(client, tool_choice={"type": "function", "function": {"name": "weather"}})
    ask(client)
    forced, named, free = (one.sampling.constraint for one in calling.asked)
    assert forced.kind == named.kind == "lark" and free is None
    assert "{0,15}" in forced.text and "{0,15}" not in named.text
    silent = ask(client, tool_choice="none").choices[0]
    assert silent.message.content == SAID and silent.message.tool_calls is None and silent.finish_reason == "stop"
    assert calling.told_tools[-1][1] is None
