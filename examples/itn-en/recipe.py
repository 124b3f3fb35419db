"""Spoken English numbers to digits (inverse text normalization), with num2words.

"the bill came to twelve dollars and fifty cents" -> "the bill came to $12.50"
"""

from __future__ import annotations

import random
from pathlib import Path

from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.recipe import Recipe, run_recipe

CARDINAL = ("{} people came", "we counted {} boxes", "about {} houses", "it weighs {} kilos", "room {}", "{}")
ORDINAL = ("on the {} floor", "this is the {} time", "for the {} year", "she finished {}", "the {} row")
YEAR = ("back in {}", "she was born in {}", "since {}", "the summer of {}")
DECIMAL = ("{} meters", "the average is {}", "version {}", "{} liters of water")
PERCENT = ("{} of voters", "prices rose by {}", "a discount of {}", "only {}")
MONEY = ("it costs {}", "the bill came to {}", "she paid {}", "{} per day")
TIME = ("the train leaves at {}", "meet me at {}", "wake up at {}")


def words(number: int | float | str, rng: random.Random, **options: str) -> str:
    """The number as one says it: without hyphens and commas, sometimes without "and"."""
    from num2words import num2words

    spoken: str = num2words(number, **options).replace("-", " ").replace(",", "")
    return spoken.replace(" and ", " ") if rng.random() < 0.5 else spoken


def whole(rng: random.Random) -> int:
    """Every number of digits from one to five is equally likely."""
    digits = rng.choice((1, 2, 2, 3, 3, 4, 5))
    return rng.randrange(10 ** (digits - 1) + (digits == 1), 10**digits)


def cardinal(rng: random.Random) -> tuple[str, str]:
    number = whole(rng)
    return words(number, rng), str(number)


def ordinal(rng: random.Random) -> tuple[str, str]:
    from num2words import num2words

    number = rng.randrange(1, 200)
    return words(number, rng, to="ordinal"), num2words(number, to="ordinal_num")


def year(rng: random.Random) -> tuple[str, str]:
    number = rng.randrange(1100, 2030)
    return words(number, rng, to="year"), str(number)


def decimal(rng: random.Random) -> tuple[str, str]:
    text = f"{rng.randrange(100)}.{rng.randrange(1, 10)}{rng.choice(('', *'123456789'))}"
    return words(text, rng), text


def percent(rng: random.Random) -> tuple[str, str]:
    number = rng.randrange(1, 101)
    return f"{words(number, rng)} percent", f"{number}%"


def money(rng: random.Random) -> tuple[str, str]:
    dollars, cents = rng.randrange(2, 1000), rng.choice((0, rng.randrange(2, 100)))
    if not cents:
        return f"{words(dollars, rng)} dollars", f"${dollars}"
    return f"{words(dollars, rng)} dollars and {words(cents, rng)} cents", f"${dollars}.{cents:02d}"


def time(rng: random.Random) -> tuple[str, str]:
    hour, minute, half = rng.randrange(1, 13), rng.choice((5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55)), rng.choice("ap")
    spoken = ("oh " if minute < 10 else "") + words(minute, rng)
    return f"{words(hour, rng)} {spoken} {half} m", f"{hour}:{minute:02d} {half}m"


KINDS = (
    (cardinal, CARDINAL),
    (cardinal, CARDINAL),
    (ordinal, ORDINAL),
    (year, YEAR),
    (decimal, DECIMAL),
    (percent, PERCENT),
    (money, MONEY),
    (time, TIME),
)


def make_pair(rng: random.Random) -> tuple[str, str]:
    """One phrase as spoken and as written."""
    make, phrases = rng.choice(KINDS)
    spoken, written = make(rng)
    phrase = rng.choice(phrases)
    return phrase.format(spoken), phrase.format(written)


RECIPE = Recipe(
    name="itn-en",
    instruction="Write the numbers as digits:",
    make_pair=make_pair,
    options=TrainOptions(rank=8, epochs=1.0, batch_size=16, held_out=0.0, seed=1),
)

if __name__ == "__main__":
    from adaplex_server.bases.embedded import ensure_embedded

    run_recipe(RECIPE, Path(__file__).parent, lambda: ensure_embedded(None), "smollm2-135m-instruct")
