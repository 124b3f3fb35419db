"""Curves: what is plotted, as SVG that needs nothing, and as PNG where matplotlib is installed (extra 'report')."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaplex_adapters.training.report.record import RunRecord

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 280, 64, 36, 16
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#7c3aed")


@dataclass(frozen=True)
class Line:
    """name, and points (x, y) in order of x."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Plot:
    """file: name of the picture without an end. y is linear and begins at the smallest value."""

    file: str
    title: str
    lines: tuple[Line, ...]


def plots_of(record: RunRecord) -> tuple[Plot, ...]:
    """Losses over the steps, the learning rate, and each metric."""
    training = Line("training loss", tuple((float(s), loss) for s, loss, _ in record.curve))
    held_out = Line("held-out loss", tuple((float(m["step"]), float(m["loss"])) for m in record.history))
    rate = Line("learning rate", tuple((float(s), r) for s, _, r in record.curve))
    metrics = tuple(
        Line(name, tuple((float(m["step"]), float(m["metrics"][name])) for m in record.history))
        for name in record.result.metrics_after
    )
    found = [Plot("loss", "Loss (nats a token)", (training, held_out) if held_out.points else (training,))]
    if metrics and metrics[0].points:
        found.append(Plot("metrics", "Metrics on held-out rows", metrics))
    return (*found, Plot("learning-rate", "Learning rate", (rate,)))


def svg(plot: Plot) -> str:
    """The plot as an SVG element of its own."""
    xs = [x for line in plot.lines for x, _ in line.points]
    ys = [y for line in plot.lines for _, y in line.points]
    low, high = min(ys), max(ys)
    span_x, span_y = (max(xs) - min(xs)) or 1.0, (high - low) or 1.0

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - min(xs)) / span_x * (_WIDTH - _LEFT - 12)
        down = _TOP + (high - y) / span_y * (_HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(plot.title)}">']
    for i in range(5):
        value = low + span_y * i / 4
        at = place(min(xs), value).split(",")[1]
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{at}" y2="{at}" stroke="#8884" />')
        parts.append(f'<text x="{_LEFT - 6}" y="{at}" text-anchor="end" dy="4">{value:.3g}</text>')
    for x in (min(xs), max(xs)):
        across = place(x, low).split(",")[0]
        parts.append(f'<text x="{across}" y="{_HEIGHT - 14}" text-anchor="middle">step {x:.0f}</text>')
    for line, colour in zip(plot.lines, _COLOURS * len(plot.lines), strict=False):
        points = " ".join(place(x, y) for x, y in line.points)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}" />')
        parts += [f'<circle r="2.5" fill="{colour}" cx="{p[0]}" cy="{p[1]}" />' for p in _few(line, place)]
    return "".join((*parts, "</svg>"))


def write_png(plot: Plot, folder: Path) -> str | None:
    """The name of the picture written, None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7.2, 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for line in plot.lines:
        axes.plot([x for x, _ in line.points], [y for _, y in line.points], label=line.name, linewidth=1.2)
    axes.set_title(plot.title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend()
    name = f"{plot.file}.png"
    figure.savefig(folder / name)
    return name


def colours(plot: Plot) -> Sequence[tuple[str, str]]:
    """(name, colour) of each line, for a legend."""
    return [(line.name, colour) for line, colour in zip(plot.lines, _COLOURS * len(plot.lines), strict=False)]


def _few(line: Line, place: object) -> list[list[str]]:
    """Dots for lines of few points, which would else be hard to see."""
    assert callable(place)
    return [place(x, y).split(",") for x, y in line.points] if len(line.points) <= 40 else []
