"""One HTML file that shows a run: tables and plots drawn as SVG, without anything from outside."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from adaplex_loadtest.answered import Answered
from adaplex_loadtest.statistics import percentile

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;"
    "background:#fff}table{border-collapse:collapse}td,th{padding:.2rem .7rem;text-align:right;"
    "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}svg{background:#fafafa;"
    "border:1px solid #ddd;margin:.5rem 0}text{font-size:11px;fill:#555}pre{overflow:auto}"
)
_COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 860, 260, 60, 30

Points = Sequence[tuple[float, float]]


def page(title: str, told: dict[str, Any], models: Sequence[dict[str, Any]], plots: Sequence[str]) -> str:
    """The whole document. told: the run's figures; models: `load_figures.by_model`; plots: of `plot`."""
    rows = "".join(_model_row(line) for line in models)
    head = "<tr><th>model<th>requests<th>good<th>first token p50<th>p99<th>between tokens p50<th>p99<th>errors</tr>"
    table = f"<h2>Models</h2><table>{head}{rows}</table><p>Milliseconds.</p>" if rows else ""
    figures = "".join(f"<tr><td>{html.escape(k)}<td>{html.escape(json.dumps(v))}</tr>" for k, v in told.items())
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>{''.join(plots)}{table}<h2>Figures</h2><table>{figures}</table></html>"
    )


def plots_of_run(answered: Sequence[Answered]) -> list[str]:
    """First tokens over time, their distribution by model, and what came of the requests in each second."""
    models = sorted({one.model for one in answered})
    firsts = {
        m: [(one.at, one.first_token * 1000) for one in answered if one.model == m and one.first_token is not None]
        for m in models
    }
    quantiles = {
        m: [(share, percentile([ms for _, ms in points], share / 100)) for share in range(0, 101, 2)]
        for m, points in firsts.items()
        if points
    }
    last = max((one.at for one in answered), default=0.0)
    per_second: dict[str, Points] = {
        name: [
            (s, sum(int(one.at) == s and (one.error is None) == fine for one in answered)) for s in range(int(last) + 1)
        ]
        for name, fine in (("answered", True), ("not answered", False))
    }
    return [
        plot("Time to first token (ms) of requests by arrival (s)", firsts, dots=True),
        plot("Time to first token (ms) by percentile", quantiles),
        plot("Requests by second of arrival", per_second),
    ]


def plot(title: str, lines: dict[str, Any], dots: bool = False) -> str:
    """A chart from zero. lines: name -> [(x, y)]; dots: do not join them."""
    everything = [point for points in lines.values() for point in points] or [(0.0, 0.0)]
    right = max(x for x, _ in everything) or 1.0
    top = max(y for _, y in everything) or 1.0

    def place(x: float, y: float) -> str:
        across = _LEFT + x / right * (_WIDTH - _LEFT - 10)
        return f"{across:.1f},{_HEIGHT - _BOTTOM - y / top * (_HEIGHT - _BOTTOM - 20):.1f}"

    drawn = []
    for number, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        if dots:
            centres = (place(x, y).split(",") for x, y in points)
            drawn += [f'<circle cx="{x}" cy="{y}" r="2" fill="{colour}"/>' for x, y in centres]
        else:
            path = " ".join(place(x, y) for x, y in points)
            drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        label = html.escape(name[:24])
        x, y = _LEFT + 8 + 140 * (number % 6), 12 + 12 * (number // 6)
        drawn.append(f'<text x="{x}" y="{y}" style="fill:{colour}">{label}</text>')
    box = f"viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='{html.escape(title)}'"
    return f"<h2>{html.escape(title)}</h2><svg {box}>{_axes(right, top)}{''.join(drawn)}</svg>"


def _axes(right: float, top: float) -> str:
    floor, ceiling = _HEIGHT - _BOTTOM, 20
    parts = [f'<path d="M{_LEFT} {ceiling}V{floor}H{_WIDTH - 10}" fill="none" stroke="#999"/>']
    for part in range(5):
        x = _LEFT + part / 4 * (_WIDTH - _LEFT - 10)
        y = floor - part / 4 * (floor - ceiling)
        parts.append(f'<text x="{x - 8:.0f}" y="{floor + 16}">{right * part / 4:.4g}</text>')
        parts.append(f'<text x="4" y="{y + 4:.0f}">{top * part / 4:.4g}</text>')
    return "".join(parts)


def _model_row(line: dict[str, Any]) -> str:
    first, between = line.get("time_to_first_token_ms", {}), line.get("inter_token_ms", {})
    numbers = (
        line["requests"],
        line["good"],
        first.get("p50"),
        first.get("p99"),
        between.get("p50"),
        between.get("p99"),
    )
    cells = "".join(f"<td>{'' if number is None else number}" for number in numbers)
    return f"<tr><td>{html.escape(line['model'])}{cells}<td>{html.escape(json.dumps(line['errors']))}</tr>"
