"""The HTTP interface of a real server, through the official client."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from running_server import RunningServer

ROOT = Path(__file__).parents[2]
BASE = "smollm2-135m-instruct"
ADAPTER = ROOT / "examples" / "itn-en" / "adapter"
NUMBERS = [{"role": "user", "content": "the bill came to twelve dollars and fifty cents"}]
STORY: list[Any] = [{"role": "user", "content": "Tell me a long story."}]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=120) as made:
        limit = time.monotonic() + 60
        while "itn-en" not in {one.id for one in made.models.list()}:
            assert time.monotonic() < limit, "the demo adapters are not there"
            time.sleep(0.2)
        yield made


def say(client: OpenAI, model: str, messages: list[Any], **more: Any) -> str:
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, **{"max_tokens": 16, **more})
    return str(answer.choices[0].message.content)


def test_the_model_field_chooses_the_adapter(client: OpenAI) -> None:
    assert {BASE, "itn-en"} <= {one.id for one in client.models.list()}
    assert say(client, "itn-en", NUMBERS) == "the bill came to $12.50"
    assert say(client, BASE, NUMBERS) != "the bill came to $12.50"


def test_a_stream_says_the_same_as_the_whole_answer(client: OpenAI) -> None:
    for model in (BASE, "itn-en"):
        chunks = list(
            client.chat.completions.create(
                model=model,
                messages=STORY,
                temperature=0,
                max_tokens=16,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert said == say(client, model, STORY)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens <= 24


def test_choices_and_seeds(client: OpenAI) -> None:
    def ask() -> list[str | None]:
        got = client.chat.completions.create(model=BASE, messages=STORY, n=3, seed=5, max_tokens=12, temperature=1)
        return [one.message.content for one in got.choices]

    first = ask()
    assert first == ask()
    assert len(set(first)) == 3


def test_a_stop_string_is_not_shown(client: OpenAI) -> None:
    whole = say(client, BASE, STORY)
    word = whole.split()[3]
    got = client.chat.completions.create(model=BASE, messages=STORY, temperature=0, max_tokens=16, stop=[word])
    assert got.choices[0].message.content == whole[: whole.index(word)]
    assert got.choices[0].finish_reason == "stop"


def test_scoring_agrees_with_generating(client: OpenAI) -> None:
    """What a greedy answer said of its tokens is what echo says of them as a prompt."""
    for model in (BASE, "itn-en"):
        ids = {"return_token_ids": True}
        made = client.completions.create(
            model=model, prompt="The capital of France is", temperature=0, max_tokens=8, logprobs=2, extra_body=ids
        ).choices[0]
        prompt, answer = made.prompt_token_ids, made.token_ids  # type: ignore[attr-defined]
        assert len(answer) > 2
        scored = client.completions.create(model=model, prompt=prompt + answer, max_tokens=0, echo=True, logprobs=2)
        told = scored.choices[0].logprobs
        assert scored.choices[0].text == "The capital of France is" + made.text
        assert told.tokens[len(prompt) :] == made.logprobs.tokens[: len(answer)]
        for one, two in zip(made.logprobs.token_logprobs, told.token_logprobs[len(prompt) :], strict=False):
            assert math.isclose(one, two, abs_tol=0.25), "logits of 16 and more are 1/8 apart in bfloat16"


def test_errors(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="itn-en"):
        say(client, "nobody", NUMBERS)
    with pytest.raises(BadRequestError) as caught:
        say(client, BASE, NUMBERS, max_tokens=1_000_000)
    assert caught.value.code == "context_length_exceeded"


async def test_64_streams_over_four_models(server: RunningServer, client: OpenAI) -> None:
    models = [BASE, *(one.id for one in client.models.list() if one.id != BASE)][:4]
    expected = {model: say(client, model, NUMBERS, max_tokens=6) for model in models}
    async with AsyncOpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=120) as many:

        async def one(model: str) -> tuple[str, str]:
            stream = await many.chat.completions.create(
                model=model, messages=NUMBERS, temperature=0, max_tokens=6, stream=True
            )
            return model, "".join([c.choices[0].delta.content or "" async for c in stream])

        for model, said in await asyncio.gather(*(one(models[i % len(models)]) for i in range(64))):
            assert said == expected[model]
    server.wait_for("adaplex_requests_running", 0)


def test_an_uploaded_adapter_serves_and_goes(server: RunningServer, client: OpenAI) -> None:
    files = [("files", (one.name, one.read_bytes())) for one in sorted(ADAPTER.glob("adapter_*"))]
    made = httpx.post(f"{server.http}/v1/adapters", data={"name": "again"}, files=files, timeout=60)
    assert made.status_code == 201, made.text
    assert made.json()["revision"] == httpx.get(f"{server.http}/v1/adapters/itn-en").json()["revision"]
    assert say(client, "again", NUMBERS) == "the bill came to $12.50"
    assert httpx.delete(f"{server.http}/v1/adapters/again", timeout=60).status_code == 200
    with pytest.raises(NotFoundError):
        say(client, "again", NUMBERS)


def test_a_damaged_upload_is_refused(server: RunningServer) -> None:
    whole = (ADAPTER / "adapter_model.safetensors").read_bytes()
    config = ("files", ("adapter_config.json", (ADAPTER / "adapter_config.json").read_bytes()))
    for damaged in (whole[:-10], b"\xff" * 8 + whole[8:], b""):
        parts = [config, ("files", ("adapter_model.safetensors", damaged))]
        answer = httpx.post(f"{server.http}/v1/adapters", data={"name": "bad"}, files=parts, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_adapter")
    assert httpx.get(f"{server.http}/v1/adapters/bad").status_code == 404
