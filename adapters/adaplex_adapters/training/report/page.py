"""The report as one HTML file: curves, figures, options and answers, with nothing fetched from anywhere. Pure."""

from __future__ import annotations

import html
from collections.abc import Sequence

from adaplex_adapters.training.options import plain_fields
from adaplex_adapters.training.report.card import figure_rows, memory_line
from adaplex_adapters.training.report.curves import Plot, colours, plots_of, svg
from adaplex_adapters.training.report.record import RunRecord, versions

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
:root { color-scheme: light dark; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
td, th { border-bottom: 1px solid #8884; padding: .25rem .75rem; text-align: left; vertical-align: top; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: currentColor; }
td { overflow-wrap: anywhere; } .legend span { margin-right: 1rem; }
"""


def report_page(record: RunRecord) -> str:
    """The text of report.html."""
    result, data = record.result, record.data
    name = html.escape(result.out.name)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title><style>{_STYLE}</style>",
        f"<h1>{name}</h1><p>{html.escape(record.options.method)} for {html.escape(record.base)} ({record.form}): "
        f"{result.steps} steps over {result.examples} rows, {result.tokens:,} tokens in {result.seconds:.0f} s. "
        f"{html.escape(memory_line(record))}</p>",
        "<h2>Held-out rows</h2>",
        _table(("", "base", "adapter"), figure_rows(record)),
        *(_figure(plot) for plot in plots_of(record)),
    ]
    if record.samples:
        answers = [(s.asked, s.wanted, s.base, s.adapter) for s in record.samples]
        parts += ["<h2>Answers</h2>", _table(("asked", "wanted", "base", "adapter"), answers)]
    facts = [(k, str(v)) for k, v in vars(data).items()] + [("source", record.source or "-")]
    parts += ["<h2>Data</h2>", _table(("", ""), facts)]
    parts += ["<h2>Options</h2>", _table(("", ""), [(k, str(v)) for k, v in plain_fields(record.options).items()])]
    parts += ["<h2>Made with</h2>", _table(("", ""), list(versions().items())), "</html>"]
    return "\n".join(parts)


def _figure(plot: Plot) -> str:
    legend = "".join(f'<span style="color:{c}">■ {html.escape(n)}</span>' for n, c in colours(plot))
    return f"<h2>{html.escape(plot.title)}</h2><p class=legend>{legend}</p>{svg(plot)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in head) if any(head) else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{titles}</tr>{body}</table>"
