"""The document describes every route, and what is really answered fits it."""

from __future__ import annotations

from typing import Any

import jsonschema
import orjson
import pytest
from starlette.routing import Route

from adaplex_server.http_api.app import create_app

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def document(http: Any) -> dict[str, Any]:
    answer: dict[str, Any] = http.get("/openapi.json").json()
    return answer


def test_every_route_is_described_and_nothing_else(document: dict[str, Any], service: Any) -> None:
    served = set()
    for route in create_app(service).routes:
        assert isinstance(route, Route)
        for method in route.methods or ():
            if method != "HEAD":
                served.add((method.lower(), route.path.replace(":path", "")))
    described = {(method, path) for path, item in document["paths"].items() for method in item}
    assert described == served


def test_it_is_openapi_31(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    ids = [op["operationId"] for item in document["paths"].values() for op in item.values()]
    assert len(ids) == len(set(ids))
    for path, item in document["paths"].items():
        for operation in item.values():
            assert operation["summary"]
            assert all("description" in one for one in operation["responses"].values())
            wanted = {one["name"] for one in operation.get("parameters", []) if one["in"] == "path"}
            assert wanted == {part[1:-1] for part in path.split("/") if part.startswith("{")}
    for name, schema in document["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema.get("type") == "object", name
    for ref in _refs(document):
        assert ref.removeprefix("#/components/schemas/") in document["components"]["schemas"], ref


def _refs(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [ref for one in value.values() for ref in _refs(one)]
    return [ref for one in value for ref in _refs(one)] if isinstance(value, list) else []


def _fits(document: dict[str, Any], name: str, value: Any) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


@pytest.mark.parametrize("logprobs", [False, True])
def test_answers_fit_their_schemas(document: dict[str, Any], http: Any, logprobs: bool) -> None:
    chat = {"model": "alpha", "messages": USER, "logprobs": logprobs, "return_token_ids": logprobs}
    text = {"model": "alpha", "prompt": "xA", "echo": True, "logprobs": 2 if logprobs else None, "prompt_logprobs": 1}
    extra = {"stream": True, "stream_options": {"include_usage": True}}
    for path, body, asked, answered, event in (
        ("/v1/chat/completions", chat, "ChatCompletionRequest", "ChatCompletion", "ChatCompletionChunk"),
        ("/v1/completions", text, "CompletionRequest", "Completion", "Completion"),
    ):
        _fits(document, asked, body)
        _fits(document, asked, {**body, **extra})
        _fits(document, answered, http.post(path, json=body).json())
        events = http.post(path, json={**body, **extra}).text.split("\n\n")[:-2]
        for one in events:
            _fits(document, event, orjson.loads(one.removeprefix("data: ")))
    _fits(document, "ModelList", http.get("/v1/models").json())
    _fits(document, "AdapterList", http.get("/v1/adapters").json())
    _fits(document, "Health", http.get("/ready").json())
    _fits(document, "ErrorAnswer", http.get("/nowhere").json())


def test_a_wrong_body_does_not_fit(document: dict[str, Any]) -> None:
    for bad in ({"model": "x"}, {"model": "x", "messages": USER, "nonsense": 1}, {"model": "x", "messages": []}):
        with pytest.raises(jsonschema.ValidationError):
            _fits(document, "ChatCompletionRequest", bad)
