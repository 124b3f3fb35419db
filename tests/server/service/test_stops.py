"""A stop string is never sent, whatever the chunks; what is held back is the least possible."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from adaplex_server.service.stops import StopMatcher, build_stops

LETTERS = st.text("ab\n", max_size=30)
STRINGS = st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4, unique=True)


def oracle(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Text before the stop string that ends first (the longest of those that end together)."""
    for end in range(1, len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            longest = max(here, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(chunks: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None]:
    automaton = build_stops(stops)
    assert automaton
    matcher = StopMatcher(automaton, include=include)
    sent = ""
    for chunk in chunks:
        sent += matcher.push(chunk)
        if matcher.matched is not None:
            return sent, matcher.matched
    return sent + matcher.flush(), None


@given(text=LETTERS, stops=STRINGS, cuts=st.lists(st.integers(0, 30), max_size=8))
def test_any_split_gives_the_same_text_and_match(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[a:b] for a, b in pairwise(edges)]
    assert run(chunks, stops) == oracle(text, stops)


@given(text=LETTERS, stops=STRINGS)
def test_included_stop_ends_the_text(text: str, stops: list[str]) -> None:
    before, matched = oracle(text, stops)
    assert run(list(text), stops, include=True) == (before + (matched or ""), matched)


@given(text=LETTERS, stops=STRINGS)
def test_held_text_is_the_longest_possible_beginning(text: str, stops: list[str]) -> None:
    automaton = build_stops(stops)
    assert automaton
    matcher = StopMatcher(automaton)
    sent = matcher.push(text)
    if matcher.matched is None:
        begins = [k for stop in stops for k in range(len(stop)) if text.endswith(stop[:k])]
        assert len(text) - len(sent) == max(begins)


def test_nothing_to_look_for() -> None:
    assert build_stops([]) is None
