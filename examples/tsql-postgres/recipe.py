"""SQL in Microsoft's dialect to Postgres, with sqlglot as the one who knows.

SELECT TOP 5 [name] FROM [users] -> SELECT "name" FROM "users" LIMIT 5
"""

from __future__ import annotations

import random
from pathlib import Path

from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.recipe import Recipe, run_recipe

TABLES = ("users", "orders", "items", "sales", "staff", "cities", "books", "events", "tickets", "invoices", "films")
NAMES = ("name", "city", "title", "email", "country", "status", "author", "note")
NUMBERS = ("price", "total", "amount", "age", "score", "size", "rank")
DATES = ("created", "updated", "born", "due", "paid")
UNITS = ("day", "month", "year", "hour")


def bracketed(name: str, rng: random.Random) -> str:
    return f"[{name}]" if rng.random() < 0.5 else name


def expression(rng: random.Random) -> str:
    """One column or expression, half of them with something that Postgres says otherwise."""
    name, number, date = (bracketed(rng.choice(c), rng) for c in (NAMES, NUMBERS, DATES))
    return rng.choice(
        (
            name,
            number,
            f"LEN({name})",
            f"ISNULL({number}, {rng.randrange(10)})",
            f"DATEADD({rng.choice(UNITS)}, {rng.randrange(1, 30)}, {date})",
            f"IIF({number} > {rng.randrange(100)}, 'yes', 'no')",
            f"CONVERT(VARCHAR(10), {number})",
            "GETDATE()",
        )
    )


def condition(rng: random.Random) -> str:
    name, number, date = (bracketed(rng.choice(c), rng) for c in (NAMES, NUMBERS, DATES))
    return rng.choice(
        (
            f"{number} > {rng.randrange(1000)}",
            f"{date} < GETDATE()",
            f"{name} <> N'{rng.choice(('open', 'new', 'Rome', 'Lima'))}'",
            f"ISNULL({number}, 0) = {rng.randrange(10)}",
            f"LEN({name}) > {rng.randrange(2, 20)}",
        )
    )


def statement(rng: random.Random) -> str:
    """A SELECT in T-SQL."""
    top = f"TOP {rng.randrange(1, 100)} " if rng.random() < 0.6 else ""
    columns = ", ".join(expression(rng) for _ in range(rng.choice((1, 1, 2))))
    where = f" WHERE {condition(rng)}" if rng.random() < 0.5 else ""
    order = f" ORDER BY {bracketed(rng.choice(NUMBERS), rng)} DESC" if rng.random() < 0.3 else ""
    return f"SELECT {top}{columns} FROM {bracketed(rng.choice(TABLES), rng)}{where}{order}"


def make_pair(rng: random.Random) -> tuple[str, str]:
    """One statement in both dialects."""
    import sqlglot

    source = statement(rng)
    return source, sqlglot.transpile(source, read="tsql", write="postgres")[0]


RECIPE = Recipe(
    name="tsql-postgres",
    instruction="Translate from T-SQL to Postgres:",
    make_pair=make_pair,
    options=TrainOptions(rank=8, epochs=1.0, batch_size=16, held_out=0.0, seed=1),
    train_rows=960,
)

if __name__ == "__main__":
    from adaplex_server.bases.embedded import ensure_embedded

    run_recipe(RECIPE, Path(__file__).parent, lambda: ensure_embedded(None), "smollm2-135m-instruct")
