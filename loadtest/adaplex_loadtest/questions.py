"""Questions whose greedy answers are recorded alone and must be the same under load, and prompts of a given length."""

from __future__ import annotations

from typing import Any

import httpx

from adaplex_adapters.errors import InvalidRequest

ANSWER_TOKENS = 24
_STORY = "Write a long story about a lighthouse keeper, a storm and a ship that came home."
_QUESTIONS = {
    "itn-en": (
        "Write the numbers as digits: she paid twenty three dollars and five cents",
        "Write the numbers as digits: about nine hundred and twelve houses",
    ),
    "date-iso": (
        "Write as an ISO date: Saturday, 21 November 2026",
        "Write as an ISO date: the 3rd of May 1999",
    ),
    "tsql-postgres": (
        "Translate from T-SQL to Postgres: SELECT TOP 5 name FROM users WHERE LEN(name) > 3",
        "Translate from T-SQL to Postgres: SELECT ISNULL(a, 0) FROM t",
    ),
}
_OTHERS = ("Name a colour.", "What is the capital of France?")


def questions_for(model: str) -> tuple[str, ...]:
    """Those that a demo adapter was made for, or two that any model answers somehow."""
    return _QUESTIONS.get(model.removeprefix("churn-"), _OTHERS)


def filler(number: int, words: int) -> str:
    """A prompt of so many words. The number comes first, so that no two share a prefix and the cache does not help."""
    story = _STORY.split()
    return " ".join([f"{number}.", *(story[i % len(story)] for i in range(words))])


def chat_body(model: str, question: str) -> dict[str, Any]:
    """A greedy chat request."""
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": ANSWER_TOKENS}


async def record(url: str, models: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """(model, question) -> the answer when nobody else asks. Raises InvalidRequest if there is none."""
    answers = {}
    async with httpx.AsyncClient(timeout=120) as client:
        for model in models:
            for question in questions_for(model):
                told = await client.post(f"{url}/v1/chat/completions", json=chat_body(model, question))
                if told.status_code != 200:
                    raise InvalidRequest(f"{model} does not answer alone: {told.status_code} {told.text[:200]}")
                answers[model, question] = told.json()["choices"][0]["message"]["content"]
    return answers
