from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from adaplex_adapters.reader import read_unfitted
from adaplex_adapters.training.conversations import Completion
from adaplex_adapters.training.frozen_base import load_frozen_base
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.report.curves import Line, Plot, svg
from adaplex_adapters.training.trainer import Surroundings, train_adapter
from support.quiet_progress import Quiet

ROWS = tuple(Completion(i + 1, f"<b>{i}</b> | is", f" {2 * i}") for i in range(24))


class Page(HTMLParser):
    """Collects what a page would fetch, its scripts, its tags and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = TrainOptions(batch_size=8, epochs=2.0, held_out=0.2, rank=2, metrics=("exact_match", "f1"), metric_rows=3)
    out = tmp_path_factory.mktemp("report") / "sums"
    base = load_frozen_base(base_folder, "tiny", "cpu", options)
    around = Surroundings(report=True, planned_bytes=2**20, source="sums.jsonl")
    train_adapter(ROWS, base, out, options, Quiet(), around)
    return out


def test_the_folder_is_an_adapter_with_a_card_plots_and_a_page(folder: Path) -> None:
    names = {p.name for p in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "report.html"} <= names
    assert read_unfitted(folder).spec.rank == 2
    pytest.importorskip("matplotlib")
    pictures = {"loss.png", "metrics.png", "learning-rate.png"}
    assert pictures <= names and all((folder / p).read_bytes()[:4] == b"\x89PNG" for p in pictures)


def test_the_card_says_what_it_was_made_of(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: tiny\n")
    for said in (
        "sums.jsonl",
        "| loss (nats a token) |",
        "| exact_match |",
        "planned 1 MiB",
        "torch 2",
        "| rank | 2 |",
    ):
        assert said in card, said
    assert "\\|" in card and "/work" not in card and str(folder.parent) not in card


def test_the_page_stands_alone_and_escapes_what_it_shows(folder: Path) -> None:
    page = Page()
    page.feed((folder / "report.html").read_text())
    assert page.fetched == [] and "script" not in page.tags and "b" not in page.tags
    assert page.tags.count("svg") == 3 and "<b>" in page.text


def test_a_flat_and_a_single_point_have_a_plot() -> None:
    points: list[tuple[tuple[float, float], ...]] = [((1.0, 2.0),), ((1.0, 2.0), (2.0, 2.0))]
    for line in points:
        drawn = svg(Plot("x", "x", (Line("l", line),)))
        assert "nan" not in drawn and "<polyline" in drawn


def test_without_matplotlib_there_are_no_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from adaplex_adapters.training.report.curves import write_png

    hidden: Any = None
    monkeypatch.setitem(sys.modules, "matplotlib.figure", hidden)
    assert write_png(Plot("x", "x", (Line("l", ((1.0, 2.0),)),)), tmp_path) is None and not list(tmp_path.iterdir())
