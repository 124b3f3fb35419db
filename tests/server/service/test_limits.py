"""Every field has one range; defaults are OpenAI's; nothing that is not a number passes as one."""

from __future__ import annotations

from typing import Any

import pytest

from adaplex_adapters.errors import InvalidRequest, PromptTooLong
from adaplex_server.service.limits import Sampling, SamplingRequest, build_sampling
from adaplex_server.vocabulary import SamplingParams


def build(prompt_tokens: int = 10, default: int | None = None, **wish: Any) -> Sampling:
    return build_sampling(
        SamplingRequest(**wish), prompt_tokens=prompt_tokens, max_context=100, vocab_size=50, default_max_tokens=default
    )


def test_defaults() -> None:
    made = build()
    assert made.params == SamplingParams(max_tokens=90, seed=made.params.seed)
    assert (made.n, made.stop, made.include_stop) == (1, (), False)
    assert build(default=16).params.max_tokens == 16
    assert build(prompt_tokens=95, default=16).params.max_tokens == 5


def test_seed_is_drawn_when_absent_and_kept_when_given() -> None:
    assert build().params.seed != build().params.seed
    assert build(seed=7).params.seed == 7
    assert 0 <= build(seed=-1).params.seed < 1 << 63


def test_a_temperature_that_float32_cannot_hold_is_greedy() -> None:
    assert [build(temperature=t).params.temperature for t in (5e-324, 1e-300, 1e-6, 0.01)] == [0.0, 0.0, 0.0, 0.01]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", 10**400),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2.0),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-300),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("min_tokens", 91),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("seed", 1 << 64),
        ("stop", ["a"] * 65),
        ("stop", ["x" * 513]),
        ("stop", ["x" * 500] * 20),
        ("stop", ""),
        ("stop", [1]),
        ("stop_token_ids", [50]),
        ("stop_token_ids", list(range(50)) * 2),
        ("logit_bias", {50: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: float("nan")}),
    ],
)
def test_out_of_range_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        build(**{field: value})
    assert refused.value.param == field


@pytest.mark.parametrize("huge", [91, 10**18, 10**400])
def test_wish_that_does_not_fit_says_the_counts(huge: int) -> None:
    with pytest.raises(PromptTooLong, match="100 tokens, but 10 of the prompt"):
        build(max_tokens=huge)


def test_prompt_that_fills_the_context() -> None:
    assert build(prompt_tokens=99).params.max_tokens == 1
    with pytest.raises(PromptTooLong, match="shorten the prompt by 1"):
        build(prompt_tokens=100)
    with pytest.raises(InvalidRequest, match="empty"):
        build(prompt_tokens=0)


def test_scoring_may_generate_nothing() -> None:
    assert build(prompt_tokens=100, max_tokens=0, echo=True).params.max_tokens == 0
    assert build(max_tokens=0, prompt_logprobs=1).params.max_tokens == 0


def test_off_switches_and_duplicates() -> None:
    assert build(top_k=-1).params.top_k == 0
    assert build(top_k=10**6).params.top_k == 50
    assert build(stop=["a", "b", "a"]).stop == ("a", "b")
    assert build(stop="x").stop == ("x",)
