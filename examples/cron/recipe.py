"""Descriptions of schedules to lines of a crontab, with cron-descriptor: a DoRA.

"At 08:14 AM, on day 4 of the month" -> "14 8 4 * *"
"""

from __future__ import annotations

import random
from pathlib import Path

from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.recipe import Recipe, run_recipe

DAYS = ("0", "1", "2", "3", "4", "5", "6", "1-5", "0,6")


def make_pair(rng: random.Random) -> tuple[str, str]:
    """A description, as cron-descriptor words it, to the line of a crontab."""
    from cron_descriptor import get_description

    minute, hour = rng.randrange(60), rng.randrange(24)
    every, start = rng.choice((2, 3, 5, 10, 15, 20, 30)), rng.randrange(0, 20)
    first = rng.choice((f"{minute} {hour}", f"{minute} {hour}", f"*/{every} *", f"*/{every} {start}-{start + 3}"))
    month = rng.choice(("*", "*", "*", str(rng.randrange(1, 13))))
    day, weekday = rng.choice((("*", "*"), ("*", rng.choice(DAYS)), (str(rng.randrange(1, 29)), "*")))
    line = f"{first} {day} {month} {weekday}"
    return get_description(line), line


RECIPE = Recipe(
    name="cron",
    instruction="Write as a cron line:",
    make_pair=make_pair,
    options=TrainOptions(dora=True, rank=8, epochs=1.0, batch_size=16, held_out=0.0, seed=1),
    train_rows=1920,
)

if __name__ == "__main__":
    from adaplex_server.bases.embedded import ensure_embedded

    run_recipe(RECIPE, Path(__file__).parent, lambda: ensure_embedded(None), "smollm2-135m-instruct")
