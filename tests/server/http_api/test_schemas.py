"""What is refused, with which words; and that no body whatever is a bug."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import httpx
import openai
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.http_api.app import create_app
from adaplex_server.http_api.body import parse_json
from adaplex_server.http_api.schemas.chat import ChatCompletionRequest
from adaplex_server.http_api.schemas.completions import CompletionRequest
from adaplex_server.http_api.settings import HttpSettings

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]

TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": None}, "messages", "list"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [1]}, "messages[0]", "got 1"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "only tool calls go without"),
    ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role", "'system', 'developer', 'user'"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "only tool calls go without"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "not empty"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "type 'text'"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls", "belongs to"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id", "belongs to"),
    ({"messages": [{"role": "user", "content": "x", "extra": 1}]}, "messages[0].extra", "Unknown field"),
    ({"messages": [*USER, {"role": "assistant", "content": "x"}]}, "messages", "template refuses"),
    ({"model": None}, "model", "string"),
    ({"model": 5}, "model", "got 5"),
    ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
    ({"frobnicate": 1}, "frobnicate", "leave it out"),
    ({"temperature": "hot"}, "temperature", "got 'hot'"),
    ({"temperature": 3}, "temperature", "[0, 2]"),
    ({"temperature": True}, "temperature", "number"),
    ({"top_p": -0.1}, "top_p", "[0, 1]"),
    ({"n": 0}, "n", "[1, 128]"),
    ({"n": 1.5}, "n", "integer"),
    ({"n": "2"}, "n", "integer"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": -5}, "max_tokens", "-5"),
    ({"max_tokens": 10**30}, "max_tokens", "1e+30"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "contradicts"),
    ({"max_tokens": 1_000_000}, "max_tokens", "context"),
    ({"logprobs": 3}, "logprobs", "boolean"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"stop": ["x"] * 10_000}, "stop", "10000"),
    ({"stop": ["x", 1]}, "stop", "list of strings"),
    ({"stop": ""}, "stop", "not empty"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"5": "much"}}, "logit_bias", "number"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "[-100, 100]"),
    ({"logit_bias": {"999999": 1}}, "logit_bias", "[0, 299]"),
    ({"stop_token_ids": [1.5]}, "stop_token_ids", "token ids"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    ({"stream": True, "stream_options": {"include": True}}, "stream_options.include", "Unknown"),
    ({"tools": [{"type": "web"}]}, "tools[0].type", "'function'"),
    ({"tools": [TOOL]}, "tools", "no tools, or writes calls in a way"),
    ({"tools": [TOOL, TOOL]}, "tools", "two functions of one name"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "not among"),
    ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format", "exclude each other"),
    ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
    ({"audio": {"voice": "x"}}, "audio", "not supported"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "json_object"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "goes with"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format", "only once"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "response_format", "only once"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "must be a JSON schema"),
    ({"guided_choice": []}, "guided_choice", "not empty"),
    ({"guided_grammar": "root ::= ("}, "guided_grammar", "GBNF"),
    ({"guided_grammar": 'root ::= "a"\n' * 9999}, "guided_grammar", "write it in Lark"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "not possible with a constraint"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    ({"store": True}, "store", "not supported"),
    ({"service_tier": "flex"}, "service_tier", "'auto' or 'default'"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
    ({"guided_json": []}, "guided_json", "must be a JSON schema"),
]


IDS = [f"{next(iter(one[0]))}-{i}" for i, one in enumerate(REFUSED)]


@pytest.mark.parametrize(("change", "param", "words"), REFUSED, ids=IDS)
async def test_refusals_name_the_field_and_what_is_allowed(
    service: Any, change: dict[str, Any], param: str, words: str
) -> None:
    answer = await _post(service, CHAT, json.dumps({"model": "alpha", "messages": USER, **change}).encode())
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert words in error["message"]
    assert service.asked == []


BODIES = {
    "nothing": b"",
    "no json": b"{",
    "not an object": b"[]",
    "nan": b'{"temperature": NaN}',
    "infinity": b'{"temperature": Infinity}',
    "overflow": b'{"temperature": 1e999}',
    "nesting": b'{"messages": ' + b"[" * 100_000,
    "bad utf-8": b'{"model": "\xff"}',
    "lone surrogate": b'{"model": "\\ud800"}',
    "byte order mark": b"\xef\xbb\xbf{}",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
async def test_bodies_that_are_no_json_object(service: Any, path: str, body: bytes) -> None:
    answer = await _post(service, path, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_prompts_are_never_quoted_back(service: Any) -> None:
    for body in ({"messages": "top secret"}, {"messages": [{"role": "user", "content": {"a": "top secret"}}]}):
        answer = await _post(service, CHAT, orjson.dumps({"model": "alpha", **body}))
        assert answer.status_code == 400
        assert "secret" not in answer.text


@pytest.mark.parametrize("prompt", [None, [], 5, {}, [["a"]], [[1.5]], [1, "a"], ["a", 1], [[1], "a"], [True], ""])
async def test_prompts_of_no_known_form(service: Any, prompt: Any) -> None:
    answer = await _post(service, TEXT, orjson.dumps({"model": "alpha", "prompt": prompt}))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


def test_huge_bodies_are_refused_while_reading(http: Any) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 100_000

    for content in (b" " * 4_000_000, endless()):
        answer = http.post(CHAT, content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    assert http.get("/health").status_code == 200


def test_models_that_are_not_there(client: Any) -> None:
    for name in ("nobody", "a/b/../c", "x" * 900, "äpfel", "ALPHA", "alpha ", ""):
        with pytest.raises(openai.NotFoundError, match="alpha, beta") as caught:
            client.chat.completions.create(model=name, messages=USER)
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SCHEMAS = {CHAT: ChatCompletionRequest, TEXT: CompletionRequest}


def bodies(path: str) -> st.SearchStrategy[dict[str, Any]]:
    """A request that would do, with a few fields replaced by anything."""
    good = {"model": "alpha", "max_tokens": 3, **({"messages": USER} if path == CHAT else {"prompt": "x"})}
    changes = st.dictionaries(st.sampled_from(sorted(SCHEMAS[path].model_fields)), JSON, max_size=3)
    return changes.map(lambda change: {**good, **change})


@pytest.mark.parametrize("path", SCHEMAS)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_no_body_is_a_bug(service: Any, path: str, data: st.DataObject) -> None:
    body = data.draw(bodies(path))
    answer = await _post(service, path, orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS))
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert service.running == []


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_are_a_bug(body: bytes) -> None:
    try:
        assert isinstance(parse_json(body), dict)
    except InvalidRequest as error:
        error.message.encode()


async def _post(service: Any, path: str, body: bytes) -> httpx.Response:
    """Through the application alone, without a socket: many requests are cheap."""
    app = _APPS.get(service) or create_app(service, HttpSettings(max_body_bytes=200_000))
    _APPS[service] = app
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
        return await http.post(path, content=body)


_APPS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
