"""The model card: README.md with Hugging Face's front matter, in Markdown that is read without tools. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from adaplex_adapters.training.option_names import plain_options
from adaplex_adapters.training.report.record import RunRecord, versions

_SHOWN_SAMPLES = 5
_LONGEST = 200


def model_card(record: RunRecord, plots: Sequence[str]) -> str:
    """The text of README.md. plots: names of the pictures beside it."""
    result, data = record.result, record.data
    lines = [
        "---",
        f"base_model: {record.base}",
        "library_name: peft",
        "tags: [adaplex, " + record.options.method.replace("_", "-") + "]",
        "---",
        "",
        f"# {result.out.name}",
        "",
        f"An adapter ({record.options.method}, {result.parameters:,} weights) for {record.base} ({record.form}), "
        f"trained by Adaplex: {result.steps} steps over {result.examples} rows in {result.seconds:.0f} s.",
        "",
        "## Measured on held-out rows",
        "",
        *_figures(record),
        "",
        "## Data",
        "",
        *_table(
            ("", ""),
            [
                ("source", record.source or "-"),
                ("SHA-256 of the examples", data.sha256),
                ("rows learned / held out", f"{data.rows} / {data.held_out}"),
                ("tokens an epoch / of them learned", f"{data.tokens} / {data.learned}"),
                ("repeated prompts / with another answer", f"{data.duplicates} / {data.conflicting}"),
                ("left out: too long / leaks", f"{len(data.too_long)} / {len(data.leaks)}"),
            ],
        ),
        "",
        "## Options that differ from the defaults",
        "",
        *_table(("option", "value"), [(k, str(v)) for k, v in plain_options(record.options).items()]),
        "",
        "## Made with",
        "",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
        "",
    ]
    if plots:
        lines += ["## Curves", "", *(f"![{name}]({name})" for name in plots), ""]
    if record.samples:
        lines += ["## Some held-out rows", "", *_samples(record), ""]
    return "\n".join(lines)


def figure_rows(record: RunRecord) -> list[tuple[str, str, str]]:
    """(what, base, adapter)."""
    result = record.result
    rows = []
    if result.held_out_before is not None and result.held_out_after is not None:
        rows.append(("loss (nats a token)", f"{result.held_out_before:.4f}", f"{result.held_out_after:.4f}"))
    for name, after in result.metrics_after.items():
        rows.append((name, f"{result.metrics_before.get(name, float('nan')):.3f}", f"{after:.3f}"))
    return rows


def memory_line(record: RunRecord) -> str:
    """Measured beside planned."""
    planned = record.result.planned_bytes
    beside = "" if planned is None else f"; planned {planned / 2**20:.0f} MiB"
    return f"Peak memory {record.result.peak_bytes / 2**20:.0f} MiB{beside}."


def _figures(record: RunRecord) -> Iterator[str]:
    rows = figure_rows(record)
    if rows:
        yield from _table(("", "base", "adapter"), rows)
    else:
        yield "No rows were held out."
    yield ""
    yield f"Training loss {record.result.loss_first:.4f} → {record.result.loss_last:.4f}. {memory_line(record)}"


def _samples(record: RunRecord) -> Iterator[str]:
    shown = record.samples[:_SHOWN_SAMPLES]
    return _table(("asked", "wanted", "base", "adapter"), [(s.asked, s.wanted, s.base, s.adapter) for s in shown])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(_cell(text) for text in row) + " |"


def _cell(text: str) -> str:
    short = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    return short.replace("|", "\\|").replace("\n", " ")
