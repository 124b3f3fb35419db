"""Structured output through the whole server, by OpenAI's own client, on the embedded base."""

from __future__ import annotations

import json
import re
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field
from running_server import RunningServer

pytestmark = pytest.mark.slow


class Animal(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    legs: Literal[0, 2, 4, 6, 8]
    sounds: list[Literal["moo", "woof", "meow"]] = Field(max_length=2)


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=60)


def base_of(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_a_pydantic_model_comes_back(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=base_of(client),
        messages=[{"role": "user", "content": "Describe a cow."}],
        response_format=Animal,
        max_completion_tokens=120,
        n=3,
        seed=5,
    )
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 3
    assert all(isinstance(choice.message.parsed, Animal) for choice in answer.choices)


def test_a_stream_is_the_same_answer(client: openai.OpenAI) -> None:
    asked = {
        "model": base_of(client),
        "messages": [{"role": "user", "content": "A list of colours."}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "colours",
                "strict": True,
                "schema": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 2, "maxItems": 5},
            },
        },
        "seed": 1,
        "max_completion_tokens": 60,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    with client.chat.completions.create(**asked, stream=True) as events:
        pieces = "".join(event.choices[0].delta.content or "" for event in events)
    assert pieces == whole and 2 <= len(json.loads(pieces)) <= 5


def test_completions_keep_to_regex_choice_and_grammar_beside_an_adapter(client: openai.OpenAI) -> None:
    def ask(**wish: object) -> str:
        made = client.completions.create(model="date-iso", prompt="tomorrow", max_tokens=30, seed=3, extra_body=wish)
        return made.choices[0].text

    assert re.fullmatch("[0-9]{4}-(0[1-9]|1[0-2])", ask(guided_regex="[0-9]{4}-(0[1-9]|1[0-2])"))
    assert ask(structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    assert re.fullmatch("(ab ){1,3}c", ask(guided_grammar='start: two{1,3} "c"\ntwo: "a" "b "'))


def test_a_bad_schema_is_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot be used"):
        client.chat.completions.create(
            model=base_of(client),
            messages=[{"role": "user", "content": "?"}],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "thing"}}},
        )
