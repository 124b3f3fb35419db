"""What the demo recipes share: rows made in code, a training run with stated options, exact match of base and adapter.

A recipe owns its generator of (question, answer) pairs; here are the rows' form, the split and the command line.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaplex_adapters.training.conversations import Chat, Message
from adaplex_adapters.training.evaluation import Score, evaluate_local, evaluate_served, load_with_adapter
from adaplex_adapters.training.frozen_base import load_frozen_base
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.progress import ShownProgress
from adaplex_adapters.training.trainer import train_adapter

SHOWN_MISSES = 5


@dataclass(frozen=True)
class Recipe:
    """A demo task. make_pair draws one (question, answer) from the generator it is given, and from nothing else."""

    name: str
    instruction: str
    make_pair: Callable[[random.Random], tuple[str, str]]
    options: TrainOptions
    train_rows: int = 2400
    held_out_rows: int = 200
    seed: int = 2024


def make_rows(recipe: Recipe) -> tuple[tuple[Chat, ...], tuple[Chat, ...]]:
    """(training rows, held-out rows); no question appears twice, so none is on both sides."""
    rng = random.Random(recipe.seed)
    pairs: dict[str, str] = {}
    for _ in range(100 * (recipe.train_rows + recipe.held_out_rows)):
        question, answer = recipe.make_pair(rng)
        if pairs.setdefault(question, answer) != answer:
            raise AssertionError(f"{recipe.name}: {question!r} has two answers, {pairs[question]!r} and {answer!r}")
        if len(pairs) == recipe.train_rows + recipe.held_out_rows:
            break
    else:
        raise AssertionError(f"{recipe.name}: the generator makes only {len(pairs)} different questions")
    rows = [_chat(i + 1, f"{recipe.instruction} {q}", a) for i, (q, a) in enumerate(pairs.items())]
    return tuple(rows[recipe.held_out_rows :]), tuple(rows[: recipe.held_out_rows])


def _chat(line: int, question: str, answer: str) -> Chat:
    return Chat(line, (Message("user", question, learned=False), Message("assistant", answer, learned=True)))


def write_rows(rows: Sequence[Chat], path: Path) -> None:
    """Write chat JSONL, as `serve-train` reads it."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            messages = [{"role": m.role, "content": m.content} for m in row.messages]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def run_recipe(recipe: Recipe, folder: Path, locate_base: Callable[[], Path], base_name: str) -> None:
    """The recipe's command line: by default train into `folder`/adapter, then print the exact match of base and
    adapter.
    """
    parser = argparse.ArgumentParser(prog=f"{recipe.name}/recipe.py")
    parser.add_argument("--base", type=Path, help="a base in Hugging Face layout (default: the embedded one)")
    parser.add_argument("--out", type=Path, default=folder / "adapter", help="the adapter's folder")
    parser.add_argument("--write-data", type=Path, metavar="DIR", help="only write train.jsonl and held-out.jsonl")
    parser.add_argument("--score-only", action="store_true", help="do not train; score the adapter that is in --out")
    parser.add_argument(
        "--server", metavar="URL", help="only score the model of this name on a running server (.../v1)"
    )
    parser.add_argument("--rows", type=int, help="score only the first ROWS held-out rows")
    given = parser.parse_args()
    train, held_out = make_rows(recipe)
    held_out = held_out[: given.rows]
    if given.write_data:
        given.write_data.mkdir(parents=True, exist_ok=True)
        write_rows(train, given.write_data / "train.jsonl")
        write_rows(held_out, given.write_data / "held-out.jsonl")
        return
    if given.server:
        show("served", recipe, evaluate_served(given.server, recipe.name, held_out), held_out)
        return
    base_folder = given.base or locate_base()
    show("base", recipe, evaluate_local(load_frozen_base(base_folder, base_name), held_out), held_out)
    if not given.score_only:
        with ShownProgress() as progress:
            base = load_frozen_base(base_folder, base_name)
            result = train_adapter(train, base, given.out, recipe.options, progress)
        print(f"{recipe.name}: {result.steps} steps in {result.seconds:.0f} s, written to {given.out}")
    with_adapter = load_with_adapter(load_frozen_base(base_folder, base_name), given.out)
    show("adapter", recipe, evaluate_local(with_adapter, held_out), held_out)


def show(who: str, recipe: Recipe, found: Score, rows: Sequence[Chat]) -> None:
    """Print the score, and a few misses to the error stream."""
    print(
        f"{recipe.name}: {who} exact match {found.rate:.3f} ({found.matched} of {len(rows)} held-out rows)", flush=True
    )
    wrong = [(r, a) for r, a in zip(rows, found.answers, strict=True) if a.strip() != r.messages[-1].content]
    for row, answer in wrong[:SHOWN_MISSES]:
        print(f"  {row.messages[0].content!r} -> {answer[:80]!r}, not {row.messages[-1].content!r}", file=sys.stderr)
