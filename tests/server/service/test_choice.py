"""One choice's bookkeeping: which delta a token belongs to, what is counted, what a stop leaves out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaplex_server.engine.messages import RowEnd, RowToken
from adaplex_server.service.choice import Choice
from adaplex_server.service.detokenizer import Detokenizer, TokenBytes
from adaplex_server.service.stops import StopMatcher, build_stops
from adaplex_server.vocabulary import Delta, Finish, SamplingParams, TokenLogprob

END = 256
TABLE = TokenBytes((*(bytes([byte]) for byte in range(256)), b"<end>"), frozenset({END}), strips_space=False)


def made(*stop: str, include: bool = False, **sampling: Any) -> Choice:
    stops = build_stops(stop)
    matcher = StopMatcher(stops, include=include) if stops else None
    return Choice(3, 5, SamplingParams(max_tokens=99, **sampling), Detokenizer(TABLE), matcher)


def run(choice: Choice, tokens: list[RowToken], end: RowEnd) -> tuple[list[Delta], Finish]:
    """As a reader that is never behind: a delta may come after each token."""
    deltas = []
    for token in tokens:
        choice.push(token)
        if choice.matched:
            last, finish = choice.finish(None)
            return deltas + [last] * (last is not None), finish
        delta = choice.delta()
        if delta:
            deltas.append(delta)
    last, finish = choice.finish(end)
    return deltas + [last] * (last is not None), finish


def spelled(text: str) -> list[RowToken]:
    return [RowToken(1, byte, TokenLogprob(byte, -1.0)) for byte in text.encode()]


LENGTH = RowEnd(1, "length")


def test_token_of_half_a_character_waits_for_the_other_half() -> None:
    deltas, finish = run(made(), spelled("aé"), LENGTH)
    assert [(delta.text, len(delta.token_ids)) for delta in deltas] == [("a", 1), ("é", 2)]
    assert (finish.index, finish.prompt_tokens, finish.completion_tokens, finish.reason) == (3, 5, 3, "length")


def test_end_flushes_half_a_character() -> None:
    deltas, _ = run(made(), spelled("aé")[:2], LENGTH)
    assert [delta.text for delta in deltas] == ["a", "\ufffd"]


@given(
    st.lists(st.sampled_from(b"aB\xc3\xa9"), max_size=8),
    st.sampled_from(["\ufffd", "a", "\ufffda", "é"]),
    st.lists(st.integers(1, 5)),
)
def test_what_a_choice_tells_does_not_depend_on_which_tokens_come_together(
    text: list[int], stop: str, sizes: list[int]
) -> None:
    """Of any bytes, also those that are no characters, and for which a stop of U+FFFD stands."""
    told = []
    for pieces in ([1] * 8, [*sizes, 8], [8]):
        choice, at, deltas = made(stop), 0, []
        for size in pieces:
            for byte in text[at : at + size]:
                if not choice.matched:
                    choice.push(RowToken(1, byte))
            at += size
            delta = None if choice.matched or at >= len(text) else choice.delta()
            deltas += [delta] if delta else []
        last, _ = choice.finish(None if choice.matched else LENGTH)
        deltas += [last] if last else []
        told.append(("".join(d.text for d in deltas), [token for d in deltas for token in d.token_ids]))
    assert told[0] == told[1] == told[2]


@given(text=st.text("ab€", max_size=20), stop=st.text("ab€", min_size=1, max_size=3))
def test_tokens_of_deltas_spell_their_text(text: str, stop: str) -> None:
    deltas, finish = run(made(stop, logprobs=0), spelled(text), LENGTH)
    sent = "".join(delta.text for delta in deltas)
    assert sent == text.partition(stop)[0]
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert bytes(tokens) == sent.encode()
    assert [token.token_id for delta in deltas for token in delta.logprobs] == tokens
    assert finish.matched_stop == (stop if stop in text else None)


def test_included_stop_is_sent_with_its_tokens() -> None:
    deltas, finish = run(made("END", include=True), spelled("one END two"), LENGTH)
    assert "".join(delta.text for delta in deltas) == "one END"
    assert finish.completion_tokens == 7


def test_stop_strings_wait_for_min_tokens() -> None:
    deltas, finish = run(made("a", min_tokens=4), spelled("abcdea"), LENGTH)
    assert ("".join(delta.text for delta in deltas), finish.completion_tokens) == ("abcde", 6)


@pytest.mark.parametrize(("wanted", "matched"), [((END,), END), ((), None)])
def test_stop_token_counts_and_is_told_only_if_asked_for(wanted: tuple[int, ...], matched: int | None) -> None:
    end = RowEnd(1, "stop", stop_token=END, stop_logprob=TokenLogprob(END, -0.5))
    _, finish = run(made(stop_token_ids=wanted), spelled("ab"), end)
    assert (finish.reason, finish.completion_tokens, finish.matched_stop) == ("stop", 3, matched)
    assert finish.stop_logprob == TokenLogprob(END, -0.5)


def test_control_tokens_have_no_text_but_are_delivered() -> None:
    deltas, finish = run(made(ignore_eos=True), [*spelled("a"), RowToken(1, END)], LENGTH)
    assert [(delta.text, delta.token_ids) for delta in deltas] == [("a", (97,)), ("", (END,))]
    assert finish.completion_tokens == 2


def test_prompt_logprobs_come_once_on_the_first_delta() -> None:
    scores: list[TokenLogprob | None] = [None, TokenLogprob(1, -2.0)]
    first = RowToken(1, 97, TokenLogprob(97, -1.0), scores, 4)
    deltas, finish = run(made(prompt_logprobs=0, logprobs=0), [first, *spelled("b")], LENGTH)
    assert [delta.prompt_logprobs for delta in deltas] == [tuple(scores), None]
    assert finish.cached_tokens == 4
    scored, _ = run(made(prompt_logprobs=0), [], RowEnd(1, "length", prompt_logprobs=scores))
    assert [delta.prompt_logprobs for delta in scored] == [tuple(scores)]
