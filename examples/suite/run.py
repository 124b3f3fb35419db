"""The suite: seven small real tasks (the recipes in the folders beside), each trained on one loaded base and scored on
held-out rows beside the base.

    python examples/suite/run.py                        everything (an hour or two on two cores), table in results.md
    python examples/suite/run.py --tasks cron --rows 64 --scored 8      a quick look

Finished runs are kept in results.jsonl in --out, and left out when the command is given again. Same seed, same table.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adaplex_adapters.training.evaluation import evaluate_local, load_with_adapter
from adaplex_adapters.training.frozen_base import FrozenBase, load_frozen_base
from adaplex_adapters.training.options import IA3, LORA, PROMPT, TrainOptions
from adaplex_adapters.training.progress import ShownProgress
from adaplex_adapters.training.recipe import Recipe, make_rows
from adaplex_adapters.training.trainer import train_adapter

HERE = Path(__file__).parent
TASKS = ("itn-en", "date-iso", "tsql-postgres", "cron", "past-tense", "language-id", "spelling-to-sound")
OTHER_METHODS = ("date-iso", "past-tense")
"""Tasks that are also learned by prompt tuning and IA3."""

METHODS: dict[str, dict[str, Any]] = {
    LORA: {"rank": 8},
    PROMPT: {"method": PROMPT, "virtual_tokens": 20},
    IA3: {"method": IA3},
}


def load_module(path: Path) -> Any:
    """A file of the examples, which are no package."""
    spec = importlib.util.spec_from_file_location(f"suite_{path.parent.name}_{path.stem}".replace("-", "_"), path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipes() -> dict[str, Recipe]:
    """All tasks by name."""
    return {name: load_module(HERE.parent / name / "recipe.py").RECIPE for name in TASKS}


def runs(tasks: list[str], methods: list[str]) -> Iterator[tuple[str, str]]:
    """(task, method) in order: LoRA for every task, the others for two."""
    for task in tasks:
        for method in methods:
            if method == LORA or task in OTHER_METHODS:
                yield task, method


def options_for(method: str, seed: int) -> TrainOptions:
    """The same for every task, so that only task and method differ."""
    return TrainOptions(epochs=1.0, batch_size=16, held_out=0.0, seed=seed, **METHODS[method])


def one_run(base: FrozenBase, recipe: Recipe, method: str, given: argparse.Namespace) -> dict[str, Any]:
    """Score the base, train, score the adapter. The figures are of the held-out rows."""
    recipe = dataclasses.replace(recipe, train_rows=given.rows or recipe.train_rows, seed=recipe.seed + given.seed)
    train, held_out = make_rows(recipe)
    held_out = held_out[: given.scored]
    before = evaluate_local(base, held_out)
    with ShownProgress() as progress:
        result = train_adapter(
            train, base, given.out / f"{recipe.name}-{method}", options_for(method, given.seed), progress
        )
    began = time.monotonic()
    fresh = load_with_adapter(load_frozen_base(base.folder or Path(), base.name), result.out)
    after = evaluate_local(fresh, held_out)
    return {
        "task": recipe.name,
        "method": method,
        "base": before.rate,
        "adapter": after.rate,
        "rows": len(train),
        "scored": len(held_out),
        "parameters": result.parameters,
        "steps": result.steps,
        "seconds": round(result.seconds),
        "scoring_seconds": round(time.monotonic() - began),
        "loss": round(result.loss_last, 4),
        "example": [held_out[0].messages[0].content, held_out[0].messages[-1].content, after.answers[0].strip()],
    }


def table(found: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    head = "| task | method | weights | steps | training | base | adapter |\n|---|---|---|---|---|---|---|\n"
    return head + "".join(
        f"| {r['task']} | {r['method'].replace('_', ' ')} | {r['parameters']:,} | {r['steps']} | {r['seconds']} s | "
        f"{r['base']:.3f} | {r['adapter']:.3f} |\n"
        for r in found
    )


def finished(path: Path) -> list[dict[str, Any]]:
    """Results of runs that were completed before."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def main() -> None:
    """The command line."""
    from adaplex_server.bases.embedded import NAME, ensure_embedded

    parser = argparse.ArgumentParser(prog="suite/run.py", description=__doc__)
    parser.add_argument("--tasks", help="names with commas between (default: all)")
    parser.add_argument("--methods", default=",".join(METHODS), help="lora, prompt_tuning, ia3")
    parser.add_argument("--out", type=Path, default=Path("suite-results"))
    parser.add_argument("--base", type=Path, help="a base in Hugging Face layout (default: the embedded one)")
    parser.add_argument("--rows", type=int, help="train on so many rows (default: each task's own)")
    parser.add_argument("--scored", type=int, default=200, help="held-out rows that are answered")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    known = recipes()
    given.out.mkdir(parents=True, exist_ok=True)
    log = given.out / "results.jsonl"
    done = finished(log)
    base = load_frozen_base(given.base or ensure_embedded(None), NAME)
    for task, method in runs(given.tasks.split(",") if given.tasks else list(known), given.methods.split(",")):
        if any((r["task"], r["method"]) == (task, method) for r in done):
            continue
        done.append(one_run(base, known[task], method, given))
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done[-1], ensure_ascii=False) + "\n")
        (given.out / "results.md").write_text(table(done), encoding="utf-8")
        print(table(done), flush=True)


if __name__ == "__main__":
    main()
