"""What is measured on generated answers, by name: each a mean over the rows between 0 and 1, or a function of the
user's. Pure.
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from adaplex_adapters.errors import InvalidRequest

Metric = Callable[[Sequence[str], Sequence[str]], float]
"""(answers, right answers) -> figure; higher is better."""

_WORDS = re.compile(r"[a-z0-9]+")
_ARTICLES = frozenset(("a", "an", "the"))


def exact_match(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of the answers that are right but for white space around them."""
    return _mean([float(a.strip() == w.strip()) for a, w in zip(answers, wanted, strict=True)])


def f1(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Overlap of words as SQuAD counts it (Rajpurkar et al. 2016): no case, punctuation or articles."""
    return _mean([_overlap(_plain_words(a), _plain_words(w)) for a, w in zip(answers, wanted, strict=True)])


def rouge_l(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), as Google's rouge_score has it, no stemming."""
    pairs = zip(answers, wanted, strict=True)
    return _mean([_common_subsequence(_WORDS.findall(a.lower()), _WORDS.findall(w.lower())) for a, w in pairs])


METRICS: Mapping[str, Metric] = {"exact_match": exact_match, "f1": f1, "rouge_l": rouge_l}


def find_metric(name: str) -> Metric:
    """A metric by its name, or the function that "module:function" names. Raises InvalidRequest."""
    if name in METRICS:
        return METRICS[name]
    module, _, function = name.partition(":")
    if not function:
        raise InvalidRequest(
            f"there is no metric {name!r}; use {', '.join(METRICS)}, or module:function for one of your own",
            param="metrics",
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InvalidRequest(f"the metric {name!r} cannot be imported: {error}", param="metrics") from error

    def measured(answers: Sequence[str], wanted: Sequence[str]) -> float:
        return float(found(list(answers), list(wanted)))

    return measured


def _overlap(answer: list[str], wanted: list[str]) -> float:
    if not answer or not wanted:
        return float(answer == wanted)
    common = (Counter(answer) & Counter(wanted)).total()
    return 2 * common / (len(answer) + len(wanted))


def _plain_words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in kept.split() if word not in _ARTICLES]


def _common_subsequence(answer: list[str], wanted: list[str]) -> float:
    if not answer or not wanted:
        return 0.0
    row = [0] * (len(wanted) + 1)
    for word in answer:
        before = 0
        for i, other in enumerate(wanted, 1):
            before, row[i] = row[i], before + 1 if word == other else max(row[i], row[i - 1])
    return 2 * row[-1] / (len(answer) + len(wanted))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
