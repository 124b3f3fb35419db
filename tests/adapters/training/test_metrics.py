from __future__ import annotations

import string
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.metrics import exact_match, f1, find_metric, rouge_l

TEXTS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat.", "Mat", "12", "é"]), max_size=8).map(" ".join)


@settings(deadline=None)  # rouge_score takes a second to import
@given(TEXTS, TEXTS)
def test_rouge_l_is_googles(answer: str, wanted: str) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    assert rouge_l([answer], [wanted]) == pytest.approx(scorer.score(wanted, answer)["rougeL"].fmeasure)


@given(TEXTS, TEXTS)
def test_metrics_are_shares_and_agree_on_equal_texts(answer: str, wanted: str) -> None:
    for metric in (exact_match, f1, rouge_l):
        assert 0 <= metric([answer], [wanted]) <= 1
    assert exact_match([wanted], [wanted]) == f1([wanted], [wanted]) == 1


def test_figures_by_hand() -> None:
    assert exact_match([" a\n", "b"], ["a", "c"]) == 0.5
    assert f1(["The cat sat!"], ["cat sat down"]) == pytest.approx(2 * 2 / 5)
    assert f1(["", "x"], ["", ""]) == 0.5


def letters(answers: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(a[:1] in string.ascii_letters for a in answers) / len(wanted)


def test_a_metric_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("own_metrics")
    module.letters = letters  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_metrics", module)
    assert find_metric("own_metrics:letters")(["a", "1"], ["x", "y"]) == 0.5
    for name in ("bleu", "own_metrics:nothing", "no_such_module:x"):
        with pytest.raises(InvalidRequest, match=name):
            find_metric(name)
