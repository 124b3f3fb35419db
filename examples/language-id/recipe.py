"""The language of a number in words or of a written date, with num2words and babel: a soft prompt.

"nueve mil ciento setenta y seis" -> "Spanish"
"""

from __future__ import annotations

import datetime
import random
from pathlib import Path

from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.recipe import Recipe, run_recipe

LANGUAGES = {
    "cs": "Czech", "da": "Danish", "de": "German", "en": "English", "es": "Spanish", "fi": "Finnish", "fr": "French",
    "id": "Indonesian", "it": "Italian", "lt": "Lithuanian", "nl": "Dutch", "no": "Norwegian", "pl": "Polish",
    "pt": "Portuguese", "ro": "Romanian", "sv": "Swedish", "tr": "Turkish",
}  # fmt: skip


def make_pair(rng: random.Random) -> tuple[str, str]:
    """The language of a number in words or of a written date."""
    from babel.dates import format_date
    from num2words import num2words

    code = rng.choice(sorted(LANGUAGES))
    if rng.random() < 0.5:
        return num2words(rng.randrange(21, 10_000), lang=code), LANGUAGES[code]
    date = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(36_000))
    return format_date(date, format="full", locale=code), LANGUAGES[code]


RECIPE = Recipe(
    name="language-id",
    instruction="Which language is this?",
    make_pair=make_pair,
    options=TrainOptions(
        method="prompt_tuning",
        virtual_tokens=20,
        prompt_init_text="Name the language in which this is written: ",
        epochs=1.0,
        batch_size=16,
        held_out=0.0,
        seed=1,
    ),
    train_rows=1920,
)

if __name__ == "__main__":
    from adaplex_server.bases.embedded import ensure_embedded

    run_recipe(RECIPE, Path(__file__).parent, lambda: ensure_embedded(None), "smollm2-135m-instruct")
