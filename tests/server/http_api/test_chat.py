"""Chat completions through the official client, whole and streamed."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

USER = [{"role": "user", "content": "hi"}]
ANSWER = "[alpha|<user>hi|0]"


def test_whole_answer(client: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(model="alpha", messages=USER)
    assert raw.headers["x-request-id"].startswith("req_")
    answer = raw.parse()
    assert answer.object == "chat.completion"
    assert answer.model == "alpha"
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len("<user>hi")
    assert answer.usage.completion_tokens == len(ANSWER)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_stream_is_shaped_like_openais(client: Any) -> None:
    chunks = list(client.chat.completions.create(model="alpha", messages=USER, stream=True))
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert all(c.choices[0].delta.role is None for c in chunks[1:])
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ANSWER
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(c.usage is None for c in chunks)


def test_stream_with_usage_ends_with_a_chunk_without_choices(client: Any) -> None:
    chunks = list(
        client.chat.completions.create(
            model="alpha", messages=USER, stream=True, n=2, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == len("<user>hi"), "a prompt counts once, whatever n"
    assert chunks[-1].usage.completion_tokens == 2 * len(ANSWER)
    assert all(c.usage is None and c.choices for c in chunks[:-1])


@pytest.mark.parametrize("path", ["chat", "plain"])
def test_every_chunk_tells_the_usage_so_far(client: Any, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"model": "alpha", "stream": True, "stream_options": options}
    if path == "chat":
        chunks = list(client.chat.completions.create(messages=USER, **asked))
    else:
        chunks = list(client.completions.create(prompt="hi", max_tokens=100, **asked))
    told = [chunk.usage.completion_tokens for chunk in chunks]
    assert told == sorted(told) and len(set(told)) > 5 and chunks[-1].choices == []
    assert all(c.usage.prompt_tokens == chunks[-1].usage.prompt_tokens for c in chunks) and told[-1] == told[-2]


def test_stream_bytes(http: Any) -> None:
    body = {"model": "alpha", "messages": USER, "stream": True, "max_tokens": 2}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(one.startswith("data: {") for one in events[:-2])
    assert '"finish_reason":"length"' in events[-3]
    assert "usage" not in answer.text


def test_several_choices(client: Any) -> None:
    whole = client.chat.completions.create(model="beta", messages=USER, n=3)
    assert [c.index for c in whole.choices] == [0, 1, 2]
    assert [c.message.content for c in whole.choices] == [f"[beta|<user>hi|{i}]" for i in range(3)]
    texts = {0: "", 1: "", 2: ""}
    ends, roles = [], []
    for chunk in client.chat.completions.create(model="beta", messages=USER, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.index] if choice.delta.role else []
            ends += [choice.index] if choice.finish_reason else []
    assert texts == {i: f"[beta|<user>hi|{i}]" for i in range(3)}
    assert sorted(ends) == sorted(roles) == [0, 1, 2]


def test_logprobs(client: Any) -> None:
    asked = {"model": "unicode", "messages": USER, "logprobs": True, "top_logprobs": 3, "max_tokens": 3}
    whole = client.chat.completions.create(**asked)
    tokens = whole.choices[0].logprobs.content
    assert [t.bytes for t in tokens] == [[104], [0xC3], [0xA9]]
    assert [t.token for t in tokens] == ["h", "�", "�"]
    assert [t.logprob for t in tokens[0].top_logprobs] == [-0.5, -2.0, -9999.0], "minus infinity is no JSON"
    streamed = [
        token
        for chunk in client.chat.completions.create(**asked, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content
    ]
    assert streamed == tokens


def test_characters_are_never_broken(client: Any) -> None:
    chunks = client.chat.completions.create(model="unicode", messages=USER, stream=True)
    parts = [c.choices[0].delta.content or "" for c in chunks]
    assert "".join(parts) == "héllo 🦜"
    assert not any("�" in one for one in parts)


def test_text_parts_names_and_developer(client: Any, service: Any) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts, "name": "ann"}]
    client.chat.completions.create(model="alpha", messages=messages)
    assert bytes(service.asked[-1].prompt).decode() == "<system>be kind<user>one\ntwo"


def test_an_answer_can_be_sent_back_as_it_came(client: Any) -> None:
    first = client.chat.completions.create(model="alpha", messages=USER).choices[0].message
    messages = [*USER, first.model_dump(), {"role": "user", "content": "more"}]
    assert "more" in client.chat.completions.create(model="alpha", messages=messages).choices[0].message.content


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_lengths(client: Any, service: Any, field: str) -> None:
    answer = client.chat.completions.create(model="alpha", messages=USER, **{field: 5})
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == ANSWER[:5]
    assert service.asked[-1].sampling.max_tokens == 5


def test_without_a_length_the_rest_of_the_context_is_free(client: Any, service: Any) -> None:
    client.chat.completions.create(model="alpha", messages=USER)
    assert service.asked[-1].sampling.max_tokens == 4096 - len("<user>hi")


def test_every_sampling_field_arrives(client: Any, service: Any) -> None:
    client.chat.completions.create(
        model="alpha",
        messages=USER,
        temperature=0.5,
        top_p=0.25,
        seed=7,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"65": 2},
        stop=["x", "y"],
        extra_body={
            "top_k": 4,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "stop_token_ids": [66],
            "ignore_eos": True,
            "include_stop_str_in_output": True,
            "priority": 3,
        },
    )
    asked = service.asked[-1]
    got = asked.sampling
    assert (got.temperature, got.top_p, got.top_k, got.min_p, got.seed) == (0.5, 0.25, 4, 0.125, 7)
    assert (got.presence_penalty, got.frequency_penalty, got.repetition_penalty) == (0.5, -0.5, 1.5)
    assert (got.logit_bias, got.stop_token_ids, got.ignore_eos, got.min_tokens) == ({65: 2.0}, (66,), True, 2)
    assert (asked.stop, asked.include_stop, asked.priority) == (("x", "y"), True, 3)


def test_harmless_fields_pass(client: Any) -> None:
    client.chat.completions.create(
        model="alpha",
        messages=USER,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        response_format={"type": "text"},
        modalities=["text"],
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
    )


def test_token_ids_on_request(client: Any) -> None:
    extra = {"return_token_ids": True, "prompt_logprobs": 1}
    answer = client.chat.completions.create(model="alpha", messages=USER, max_tokens=2, extra_body=extra)
    assert answer.choices[0].token_ids == [ord("["), ord("a")]
    assert answer.prompt_token_ids == list(b"<user>hi")
    assert answer.prompt_logprobs[0] is None
    assert answer.prompt_logprobs[1][str(ord("u"))] == {"logprob": -0.5, "rank": 1, "decoded_token": "u"}
    chunks = list(
        client.chat.completions.create(model="alpha", messages=USER, max_tokens=2, stream=True, extra_body=extra)
    )
    assert chunks[0].prompt_token_ids == list(b"<user>hi")
    assert chunks[0].prompt_logprobs == answer.prompt_logprobs


async def test_64_streams_at_once_over_four_models(address: str, service: Any) -> None:
    async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:

        async def one(i: int) -> tuple[str, str]:
            model = ("alpha", "beta", "unicode", "org/base")[i % 4]
            messages = [{"role": "user", "content": f"question {i}"}]
            stream = await client.chat.completions.create(model=model, messages=messages, stream=True)
            said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return said, "héllo 🦜" if model == "unicode" else f"[{model}|<user>question {i}|0]"

        for said, expected in await asyncio.gather(*(one(i) for i in range(64))):
            assert said == expected


@pytest.mark.parametrize("model", ["breaks-late", "bug-late"])
def test_an_error_after_the_first_byte_is_an_event(client: Any, http: Any, model: str) -> None:
    with pytest.raises(openai.APIError) as caught:
        list(client.chat.completions.create(model=model, messages=USER, stream=True))
    assert "secret" not in str(caught.value)
    answer = http.post("/v1/chat/completions", json={"model": model, "messages": USER, "stream": True})
    assert answer.status_code == 200
    last = answer.text.split("\n\n")[-2]
    assert last.startswith('data: {"error":{"message":')
    assert "[DONE]" not in answer.text


def test_an_error_before_the_first_byte_is_a_status(client: Any) -> None:
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="full", messages=USER, stream=stream)
        assert caught.value.response.headers["retry-after"] == "3"
        with pytest.raises(openai.InternalServerError) as down:
            client.chat.completions.create(model="down", messages=USER, stream=stream)
        assert down.value.status_code == 503
        assert down.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.InternalServerError) as broken:
            client.chat.completions.create(model="breaks", messages=USER, stream=stream)
        assert broken.value.code == "row_failed"
        with pytest.raises(openai.InternalServerError) as bug:
            client.chat.completions.create(model="bug", messages=USER, stream=stream)
        assert bug.value.code == "internal_error"
        assert "secret" not in str(bug.value)
