"""Plain completions: prompts of every form, echo, the older log-probabilities, batches, streams."""

from __future__ import annotations

import itertools
from typing import Any

import openai
import pytest

PROMPTS = ["ab", ["ab"], list(b"ab"), [list(b"ab")]]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_forms_of_one_prompt(client: Any, prompt: Any) -> None:
    answer = client.completions.create(model="alpha", prompt=prompt)
    assert answer.object == "text_completion"
    assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [(0, "[alpha|ab|0]", "stop")]
    assert answer.usage.prompt_tokens == 2


def test_default_length_is_16(client: Any) -> None:
    answer = client.completions.create(model="alpha", prompt="a long prompt")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_batches(client: Any, stream: bool, n: int) -> None:
    """More prompts than may run at once; index = prompt * n + answer."""
    prompts = [f"prompt {i}" for i in range(20)]
    got = client.completions.create(model="beta", prompt=prompts, n=n, max_tokens=100, stream=stream)
    texts: dict[int, str] = {}
    for choice in itertools.chain.from_iterable(one.choices for one in got) if stream else got.choices:
        texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {p * n + i: f"[beta|prompt {p}|{i}]" for p in range(20) for i in range(n)}


def test_a_batch_with_many_choices_keeps_within_the_servers_room(client: Any, service: Any) -> None:
    service.places = 20
    for n, most in ((1, 4), (3, 9), (10, 10), (20, 20)):
        service.most = 0
        answer = client.completions.create(model="slow", prompt=["x"] * 12, n=n, max_tokens=3)
        assert len(answer.choices) == 12 * n and service.most == most


def test_usage_of_a_batch(client: Any) -> None:
    asked = {"model": "beta", "prompt": ["a", "bcd"], "n": 2, "max_tokens": 3}
    usage = client.completions.create(**asked).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 12, 16)
    streamed = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert streamed[-1].usage == usage
    assert streamed[-1].choices == []


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(client: Any, stream: bool) -> None:
    got = client.completions.create(model="unicode", prompt="xAé", max_tokens=2, echo=True, logprobs=1, stream=stream)
    choices = [c for one in got for c in one.choices] if stream else got.choices
    text = "".join(c.text for c in choices)
    assert text == "xAéh�"
    told = [c.logprobs for c in choices if c.logprobs]
    tokens, chances, offsets, tops = (
        [x for part in told for x in getattr(part, key)]
        for key in ("tokens", "token_logprobs", "text_offset", "top_logprobs")
    )
    assert tokens == ["x", "A", "bytes:\\xc3", "bytes:\\xa9", "h", "bytes:\\xc3"]
    assert chances == [None, -1.5, -0.5, -0.5, -0.5, -0.5]
    assert offsets == [0, 1, 2, 2, 3, 4]
    assert tops[0] is None
    assert tops[1] == {"A": -0.25}, "of two tokens with one text the likelier one is told"
    assert tops[2] == {"bytes:\\xc3": -0.5}


def test_scoring_without_generating(client: Any) -> None:
    answer = client.completions.create(model="alpha", prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].logprobs.token_logprobs == [None, -0.5, -0.5]
    assert answer.choices[0].logprobs.top_logprobs == [None, {"b": -0.5}, {"c": -0.5}]
    assert answer.usage.completion_tokens == 0


def test_the_end_token_is_told_with_logprobs(client: Any) -> None:
    """lm-eval asks for one token and drops the last entry: without this it would drop a token of the prompt."""
    answer = client.completions.create(model="ends-at-once", prompt="abc", max_tokens=1, echo=True, logprobs=1)
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].logprobs.tokens == ["a", "b", "c", "<end>"]
    assert answer.choices[0].logprobs.token_logprobs == [None, -0.5, -0.5, -0.125]


def test_lm_eval_reads_the_right_likelihoods(http: Any) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    prompts = [list(b"xyAb"), list(b"wxyz"), list(b"bA")]
    body = {"model": "ends-at-once", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    answer = http.post("/v1/completions", json={**body, "seed": 1234}).json()
    read = LocalCompletionsAPI.parse_logprobs(answer, ctxlens=[1, 2, 1])
    assert read == [(-0.5 - 1.5 - 0.5, False), (-1.0, True), (-1.5, False)]


def test_echo_in_text_alone(client: Any) -> None:
    assert client.completions.create(model="alpha", prompt="ab", echo=True).choices[0].text == "ab[alpha|ab|0]"
    parts = client.completions.create(model="alpha", prompt=list(b"ab"), echo=True, n=2, stream=True)
    texts = {0: "", 1: ""}
    for part in parts:
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == {i: f"ab[alpha|ab|{i}]" for i in range(2)}


def test_prompt_logprobs_in_vllms_form(client: Any) -> None:
    answer = client.completions.create(model="alpha", prompt="xA", max_tokens=1, extra_body={"prompt_logprobs": 2})
    told = answer.choices[0].prompt_logprobs
    assert told[0] is None
    assert {key: (one["logprob"], one["rank"]) for key, one in told[1].items()} == {"65": (-1.5, 2), "257": (-0.25, 1)}
    chunks = list(
        client.completions.create(
            model="alpha", prompt="xA", max_tokens=3, stream=True, extra_body={"prompt_logprobs": 2}
        )
    )
    assert chunks[0].choices[0].prompt_logprobs == told


def test_one_bad_prompt_refuses_the_batch_before_it_starts(client: Any, service: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="alpha", prompt=[[1, 2], [1, 999_999]])
    assert caught.value.param == "prompt"
    assert service.asked == []
    with pytest.raises(openai.BadRequestError, match="at most 40"):
        client.completions.create(model="alpha", prompt=["x"] * 41)


@pytest.mark.parametrize("model", ["full", "breaks-late"])
def test_an_error_in_a_batch_ends_all_of_it(client: Any, model: str) -> None:
    with pytest.raises(openai.APIStatusError):
        client.completions.create(model=model, prompt=["a", "b", "c", "d", "e", "f"])


def test_best_of_and_suffix(client: Any) -> None:
    client.completions.create(model="alpha", prompt="x", best_of=2, n=2)
    for bad in ({"best_of": 3}, {"suffix": "end"}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="alpha", prompt="x", **bad)
        assert caught.value.param == next(iter(bad))
