"""Writing the files for people into a result folder."""

from __future__ import annotations

from pathlib import Path

from adaplex_adapters.training.report.card import model_card
from adaplex_adapters.training.report.curves import plots_of, write_png
from adaplex_adapters.training.report.page import report_page
from adaplex_adapters.training.report.record import RunRecord


def write_report(record: RunRecord, folder: Path) -> None:
    """README.md, report.html and, with matplotlib, a PNG of each plot."""
    pictures = [name for plot in plots_of(record) if (name := write_png(plot, folder)) is not None]
    (folder / "README.md").write_text(model_card(record, pictures), encoding="utf-8")
    (folder / "report.html").write_text(report_page(record), encoding="utf-8")
