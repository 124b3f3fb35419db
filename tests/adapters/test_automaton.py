"""The state machine must say what Python's `re` says, on every expression that both accept, and never take long."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaplex_adapters.automaton import MAX_LENGTH, Automaton, PatternRefused, WorkBudget

PATHS = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 10, 31)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
] + ["lm_head", "", "gpt_neox.layers.3.attention.query_key_value"]

EXPRESSIONS = [
    r".*",
    r".*\.(q|v)_proj",
    r"model\.layers\.(0|1)\..*",
    r"^(?!.*mlp).*_proj$",
    r".*(?<=self_attn\.)[qk]_proj",
    r".*(?<!self_attn\.)[a-z]+_proj",
    r"model\.layers\.\d{1,2}\.(?:self_attn|mlp)\.\w+",
    r"(?i)MODEL\.Layers\.\d+\..*Q_PROJ",
    r".*\bq_proj\b",
    r"[^.]+(\.[^.]+){3,4}",
    r"(?P<name>.*?)down_proj",
    r"(?=model).*(?=proj)proj\Z",
    r".*[\w.]{2,}?proj",
    r"(?:.*?(?:language|text|model).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)",
    r"a|",
    r"(a*)*",
]
BOMBS = [r"(a+)+$", r"(.*)*x", "(.*" * 30 + ")" * 30 + "!", ".*" * 400 + "!", r"(\w|.)*!", r"(?=(.+)+!).*"]
REFUSED = [
    r"(?:(?:(?:.?){60000}){60000}){60000}!",
    r".{4000000000}",
    "(" * 1500 + "a" + ")" * 1500,
    r"(a)\1",
    r"(?>a+)a",
    r"a++",
    r"(a)(?(1)b|c)",
    r"(",
    r"[",
    r"a{2,1}",
    r"(?s).*",
    r"a(?i:b)",
    r"(?<=a+)b",
    "a" * (MAX_LENGTH + 1),
]


def matches(pattern: str, text: str) -> bool:
    return Automaton(pattern).fullmatch(text, WorkBudget())


@pytest.mark.parametrize("pattern", EXPRESSIONS)
def test_matches_as_re_does(pattern: str) -> None:
    machine = Automaton(pattern)
    for path in PATHS:
        assert machine.fullmatch(path, WorkBudget()) == (re.fullmatch(pattern, path) is not None), path


def expressions() -> st.SearchStrategy[str]:
    """Small random expressions over the letters of module paths."""
    atoms = st.sampled_from(
        ["a", "b", "1", r"\.", ".", "[ab]", "[^a]", r"\d", r"\w", r"\W", r"\b", r"\B", "^", "$", r"\Z"]
    )

    def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        repeat = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,}", "*?", "+?", "??"])
        grouped = inner.map("(?:{})".format)
        return st.one_of(
            st.lists(inner, min_size=1, max_size=3).map("".join),
            st.lists(inner, min_size=2, max_size=3).map(lambda parts: "(" + "|".join(parts) + ")"),
            st.tuples(grouped, repeat).map("".join),
            inner.map("(?={})".format),
            inner.map("(?!{})".format),
            atoms.map("(?<={})".format),
            atoms.map("(?<!{})".format),
        )

    return st.recursive(atoms, grown, max_leaves=8)


@settings(max_examples=600, deadline=None)
@given(expressions(), st.lists(st.text("ab1.", max_size=6), min_size=1, max_size=5))
def test_matches_as_re_does_on_random_expressions(pattern: str, texts: list[str]) -> None:
    try:
        expected = re.compile(pattern)
    except re.error:
        with pytest.raises(PatternRefused):
            Automaton(pattern)
        return
    machine = Automaton(pattern)
    for text in texts:
        assert machine.fullmatch(text, WorkBudget()) == (expected.fullmatch(text) is not None)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("pattern", BOMBS)
def test_bombs_are_answered(pattern: str) -> None:
    assert not matches(pattern, "model.layers.11.self_attn.q_proj" + "a" * 60)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("pattern", REFUSED, ids=range(len(REFUSED)))
def test_refuses(pattern: str) -> None:
    with pytest.raises(PatternRefused):
        Automaton(pattern)


def test_the_budget_ends() -> None:
    machine = Automaton(r"(?=(.*.*.*.*)*!)?.*")
    budget = WorkBudget(20_000)
    with pytest.raises(PatternRefused, match="too long"):
        for _ in range(10_000):
            machine.fullmatch("a" * 60, budget)


@pytest.mark.timeout(60)
@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_refused_or_answered(pattern: str) -> None:
    with contextlib.suppress(PatternRefused):
        matches(pattern, "model.layers.1.mlp.up_proj")
