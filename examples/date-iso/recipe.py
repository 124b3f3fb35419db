"""Dates as people write them, in six languages, to ISO 8601, with babel.

"Dienstag, 3. März 2026" -> "2026-03-03"
"""

from __future__ import annotations

import datetime
import random
from pathlib import Path

from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.recipe import Recipe, run_recipe

LOCALES = ("en_US", "en_GB", "de", "fr", "es", "it", "nl")
STYLES = ("full", "long", "medium", "d MMMM y", "EEE d MMM y", "MMMM y, d")
FIRST, LAST = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)


def make_pair(rng: random.Random) -> tuple[str, str]:
    """One date as written and in ISO form."""
    from babel.dates import format_date

    date = FIRST + datetime.timedelta(days=rng.randrange((LAST - FIRST).days + 1))
    written = format_date(date, format=rng.choice(STYLES), locale=rng.choice(LOCALES))
    return written, date.isoformat()


RECIPE = Recipe(
    name="date-iso",
    instruction="Write as an ISO date:",
    make_pair=make_pair,
    options=TrainOptions(rank=8, epochs=1.0, batch_size=16, held_out=0.0, seed=1),
    train_rows=1440,
)

if __name__ == "__main__":
    from adaplex_server.bases.embedded import ensure_embedded

    run_recipe(RECIPE, Path(__file__).parent, lambda: ensure_embedded(None), "smollm2-135m-instruct")
