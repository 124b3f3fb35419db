"""The sampler against a naive one for one row, against transformers' processors, and against itself in company."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from adaplex_server.engine.choice import choose_randomly
from adaplex_server.engine.randomness import uniform
from adaplex_server.engine.row import Outcome, Row, Work
from adaplex_server.engine.sampler import Sampler
from adaplex_server.vocabulary import SamplingParams

EOS = frozenset({2})


def make_row(sampling: dict[str, Any], prompt: tuple[int, ...] = (1, 5), generated: tuple[int, ...] = ()) -> Row:
    return Row(
        id=0,
        tokens=[*prompt, *generated],
        prompt_length=len(prompt),
        sampling=SamplingParams(**{"max_tokens": 50, **sampling}),
        revision=None,
        deadline=None,
        priority=0,
        arrival=0,
        max_tokens=50,
    )


def sample(logits: torch.Tensor, rows: list[Row]) -> list[Outcome]:
    return Sampler(EOS)(logits, [Work(row, len(row.tokens) - 1, 1, 1, 0, True) for row in rows]).outcomes()


def naive_probabilities(logits: torch.Tensor, row: Row) -> list[float]:
    """One row, in plain Python: penalties, bias, ban, temperature, top_k, top_p, min_p."""
    s, x = row.sampling, logits.tolist()
    counts = Counter(row.tokens[row.prompt_length :])
    for token in set(row.tokens):
        x[token] = x[token] / s.repetition_penalty if x[token] > 0 else x[token] * s.repetition_penalty
    for token, count in counts.items():
        x[token] -= s.presence_penalty + s.frequency_penalty * count
    for token, value in s.logit_bias.items():
        x[token] += value
    if row.generated < s.min_tokens:
        for token in (*EOS, *s.stop_token_ids):
            x[token] = -math.inf
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    weights = [math.exp((x[token] - x[order[0]]) / s.temperature) for token in range(len(x))]
    if s.top_k:
        order = order[: s.top_k]
    total = sum(weights[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if s.top_p < 1 and mass >= s.top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    kept = [token for token in kept if weights[token] >= s.min_p * weights[order[0]]]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(x))]


def random_row(rng: random.Random, vocab: int) -> Row:
    sampling: dict[str, Any] = {"temperature": rng.choice([0.3, 1.0, 1.7]), "seed": rng.getrandbits(62)}
    if rng.random() < 0.5:
        sampling |= {"top_k": rng.choice([0, 1, 3, 20, 700]), "top_p": rng.choice([1.0, 0.9, 0.4, 0.01])}
    if rng.random() < 0.4:
        sampling["min_p"] = rng.choice([0.05, 0.3, 1.0])
    if rng.random() < 0.4:
        sampling |= {"presence_penalty": rng.uniform(-2, 2), "frequency_penalty": rng.uniform(-2, 2)}
    if rng.random() < 0.4:
        sampling["repetition_penalty"] = rng.uniform(0.7, 1.6)
    if rng.random() < 0.4:
        sampling["logit_bias"] = {rng.randrange(vocab): rng.uniform(-100, 100) for _ in range(3)}
    if rng.random() < 0.4:
        sampling |= {"min_tokens": 3, "stop_token_ids": (4, 7)}
    prompt = tuple(rng.randrange(vocab) for _ in range(rng.randint(1, 9)))
    return make_row(sampling, prompt, tuple(rng.randrange(vocab) for _ in range(rng.randint(0, 9))))


def test_the_chosen_token_is_where_the_uniform_number_falls() -> None:
    """Every random choice lies in the naive distribution's support, and a filterless one is its inverse exactly."""
    rng = random.Random(1)
    for _ in range(60):
        vocab = rng.choice([11, 40, 900])
        rows = [random_row(rng, vocab) for _ in range(rng.randint(1, 5))]
        logits = torch.randn(len(rows), vocab) * 3
        for i, (row, outcome) in enumerate(zip(rows, sample(logits, rows), strict=True)):
            wanted, u = naive_probabilities(logits[i], row), uniform(row.sampling.seed, row.generated)
            assert outcome.token is not None and wanted[outcome.token] > 0
            s = row.sampling
            filtered = bool(s.top_k or s.top_p < 1 or s.min_p)
            ranks = sorted(range(vocab), key=lambda t: (-wanted[t], t)) if filtered else list(range(vocab))
            before = sum(wanted[t] for t in ranks[: ranks.index(outcome.token)])
            assert before - 1e-4 <= u <= before + wanted[outcome.token] + 1e-4


def test_frequencies_follow_the_distribution() -> None:
    """Chi-square over many seeds: what is drawn is what the filters leave."""
    logits = torch.randn(1, 12)
    for extra in ({}, {"top_k": 6, "top_p": 0.9, "min_p": 0.05}):
        rows = [make_row({"temperature": 0.9, "seed": seed, **extra}) for seed in range(8000)]
        counts = Counter(choose_randomly(logits.expand(8000, -1), rows).tolist())
        wanted = naive_probabilities(logits[0], rows[0])
        chi = sum((counts[t] - 8000 * p) ** 2 / (8000 * p) for t, p in enumerate(wanted) if p > 0)
        assert chi < 35 and all(wanted[t] > 0 for t in counts)


def test_filters_keep_what_transformers_keeps() -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    rng = random.Random(3)
    for _ in range(40):
        k, p, m, t, r = (
            rng.choice([1, 5, 50]),
            rng.uniform(0.05, 0.99),
            rng.uniform(0.01, 0.4),
            rng.uniform(0.3, 2),
            1.2,
        )
        logits = torch.randn(1, 60) * 2
        prompt = tuple(rng.randrange(60) for _ in range(6))
        processors = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(r),
                TemperatureLogitsWarper(t),
                TopKLogitsWarper(k),
                TopPLogitsWarper(p),
                MinPLogitsWarper(m),
            ]
        )
        theirs = processors(torch.tensor([prompt]), logits.clone()).softmax(-1)[0]
        params = {"top_k": k, "top_p": p, "min_p": m, "temperature": t, "repetition_penalty": r}
        mine = torch.tensor(naive_probabilities(logits[0], make_row(params, prompt)))
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_company_changes_nothing() -> None:
    """A row's token and log-probabilities are the same bits alone and in any batch, with many words and ties."""
    rng = random.Random(4)
    rows = [random_row(rng, 3000) for _ in range(24)]
    rows += [make_row({"temperature": 0.0, "logprobs": i % 4}) for i in range(4)]
    logits = (torch.randn(len(rows), 3000) * 2).bfloat16().float()
    together = sample(logits, rows)
    for _ in range(3):
        order = rng.sample(range(len(rows)), rng.randint(1, len(rows)))
        assert sample(logits[order], [rows[i] for i in order]) == [together[i] for i in order]
    assert [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)] == together


def test_alternatives_are_the_lowest_ids_of_a_tie_whatever_a_neighbour_asks_for() -> None:
    logits = (torch.randn(2, 3000, generator=torch.Generator().manual_seed(0)) * 2).bfloat16().float()
    raw = logits[0].log_softmax(-1).tolist()
    best = sorted(range(3000), key=lambda token: (-raw[token], token))
    for count in range(20):
        rows = [make_row({"temperature": 0.0, "logprobs": wish}) for wish in (count, 20)]
        told = sample(logits, rows)[0].logprob
        assert told is not None and [token for token, _ in told.top] == best[:count]
        assert sample(logits[:1], rows[:1])[0].logprob == told


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    rng = random.Random(5)
    rows = [random_row(rng, 50), make_row({"temperature": 0.0, "logprobs": 2}), random_row(rng, 50)]
    logits = torch.randn(3, 50)
    clean = sample(logits, rows)
    for broken in range(3):
        damaged = logits.clone()
        damaged[broken, 7] = bad
        outcomes = sample(damaged, rows)
        assert [o.failed for o in outcomes] == [i == broken for i in range(3)]
        assert [o for i, o in enumerate(outcomes) if i != broken] == [o for i, o in enumerate(clean) if i != broken]


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = torch.zeros(1, 30)
    logits[0, [9, 4, 20]] = 1.5
    assert sample(logits, [make_row({"temperature": 0.0})])[0].token == 4


def test_end_tokens_are_banned_until_min_tokens() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 2], logits[0, 6] = 9, 8
    params = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (6,)}
    assert sample(logits, [make_row(params, generated=(3,))])[0].token == 0
    assert sample(logits, [make_row(params, generated=(3, 3))])[0].token == 2


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.randn(1, 40)
    row = make_row({"temperature": 0.5, "seed": 3, "logprobs": 5, "logit_bias": {7: 50.0}})
    told = sample(logits, [row])[0].logprob
    raw = logits[0].log_softmax(-1)
    assert told is not None and told.token_id == 7 and told.logprob == pytest.approx(float(raw[7]), abs=1e-5)
    values, ids = raw.topk(5)
    assert [i for i, _ in told.top] == ids.tolist()
    assert [v for _, v in told.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_prompt_scores_come_in_any_chunks() -> None:
    prompt = tuple(range(3, 23))
    logits = torch.randn(20, 30)
    raw = logits.log_softmax(-1)
    for size in (1, 7, 20):
        row, scores = make_row({"prompt_logprobs": 2}, prompt), []
        for start in range(0, 20, size):
            count = min(size, 20 - start)
            work = Work(row, start, count, count, min(start + count, 19) - start, start + count == 20)
            outcome = Sampler(EOS)(logits[start : start + count], [work]).outcomes()[0]
            scores += outcome.scores
        assert outcome.token is not None and len(scores) == 19
        wanted = [float(raw[i, prompt[i + 1]]) for i in range(19)]
        assert [score.logprob for score in scores] == pytest.approx(wanted, abs=1e-5)
        assert all(len(score.top) == 2 for score in scores)


def test_uniform_numbers_are_spread_and_repeatable() -> None:
    numbers = [uniform(seed, index) for seed in range(100) for index in range(100)]
    assert all(0 <= u < 1 for u in numbers) and len(set(numbers)) == len(numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.01
    buckets = Counter(int(u * 20) for u in numbers)
    assert all(abs(count - 500) < 110 for count in buckets.values())
    assert uniform(-5, 3) == uniform(-5, 3) != uniform(5, 3)
