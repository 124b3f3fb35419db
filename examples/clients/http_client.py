"""Chats with the base and with each adapter of a running server, through OpenAI's own client.

python examples/clients/http_client.py [http://127.0.0.1:8000/v1]
"""

from __future__ import annotations

import sys

from openai import OpenAI

# What the demo adapters were made for, with the instructions that they were trained with.
QUESTIONS = {
    "itn-en": "Write the numbers as digits: she paid twenty three dollars and five cents",
    "date-iso": "Write as an ISO date: Saturday, 21 November 2026",
    "tsql-postgres": "Translate from T-SQL to Postgres: SELECT TOP 5 name FROM users WHERE LEN(name) > 3",
}


def main(url: str) -> None:
    """List the models, then stream one answer from each."""
    client = OpenAI(base_url=url, api_key="not needed")
    for model in client.models.list():
        question = QUESTIONS.get(model.id, "What is the capital of France?")
        print(f"{model.id}: {question}\n  → ", end="")
        stream = client.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=64,
            stream=True,
        )
        for chunk in stream:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1")
