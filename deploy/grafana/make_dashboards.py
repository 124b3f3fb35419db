"""Writes the dashboards beside it: `python deploy/grafana/make_dashboards.py`. The JSON files are never edited by hand.

A panel is a title, a unit and its queries; a dashboard is rows of panels. Format: Grafana's dashboard JSON model,
https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
RATE = "[$__rate_interval]"
ONE = '{instance=~"$instance"}'
ADAPTER = '{instance=~"$instance", adapter=~"$adapter"}'
WIDTH, HEIGHT = 8, 8


@dataclass(frozen=True)
class Query:
    """legend: with labels between double braces."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """told: shown when one hovers over the title. stacked: the queries are parts of a whole."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    told: str = ""
    stacked: bool = False


def quantiles(metric: str, by: str, selector: str, *shares: float) -> tuple[Query, ...]:
    """Percentiles of a histogram; by: the label that tells the lines apart, or none."""
    group, legend = (f"{by}, le", f"{{{{{by}}}}} ") if by else ("le", "")
    return tuple(
        Query(
            f"histogram_quantile({share}, sum by ({group}) (rate({metric}_bucket{selector}{RATE})))",
            f"{legend}p{share * 100:g}",
        )
        for share in shares
    )


def rates(metric: str, by: str, selector: str, legend: str | None = None) -> tuple[Query, ...]:
    """A counter's growth a second."""
    return (Query(f"sum by ({by}) (rate({metric}{selector}{RATE}))", legend or f"{{{{{by}}}}}"),)


def mean(metric: str, selector: str, legend: str) -> Query:
    """Of a histogram's values."""
    return Query(f"sum(rate({metric}_sum{selector}{RATE})) / sum(rate({metric}_count{selector}{RATE}))", legend)


LATENCY = (
    Panel("Time to first token", "s", quantiles("adaplex_time_to_first_token_seconds", "adapter", ADAPTER, 0.5, 0.95)),
    Panel("Between two tokens", "s", quantiles("adaplex_inter_token_latency_seconds", "adapter", ADAPTER, 0.5, 0.95)),
    Panel("Whole requests", "s", quantiles("adaplex_request_duration_seconds", "adapter", ADAPTER, 0.5, 0.95)),
    Panel(
        "In the queue",
        "s",
        quantiles("adaplex_queue_seconds", "adapter", ADAPTER, 0.5, 0.95),
        "From a row's submission to its place in a step; waiting for an adapter's weights counts.",
    ),
    Panel(
        "Where a row's time goes (mean)",
        "s",
        (
            mean("adaplex_queue_seconds", ONE, "queue"),
            mean("adaplex_prefill_seconds", ONE, "prefill"),
            mean("adaplex_decode_seconds", ONE, "decode"),
        ),
        stacked=True,
    ),
    Panel("Requests", "reqps", rates("adaplex_requests_total", "adapter", ADAPTER)),
    Panel("Tokens generated", "short", rates("adaplex_generated_tokens_total", "adapter", ADAPTER), "A second."),
    Panel("Tokens of prompts", "short", rates("adaplex_prompt_tokens_total", "adapter", ADAPTER), "A second."),
    Panel(
        "Prompt tokens from the prefix cache",
        "percentunit",
        (
            Query(
                f"sum by (adapter) (rate(adaplex_cached_prompt_tokens_total{ADAPTER}{RATE}))"
                f" / sum by (adapter) (rate(adaplex_prompt_tokens_total{ADAPTER}{RATE}))",
                "{{adapter}}",
            ),
        ),
    ),
    Panel("How requests end", "reqps", rates("adaplex_requests_total", "reason", ADAPTER)),
    Panel(
        "Errors",
        "reqps",
        rates("adaplex_request_errors_total", "adapter, error", '{instance=~"$instance"}', "{{adapter}}: {{error}}"),
        "With the names of requests that were refused before an adapter was known as 'unknown'.",
    ),
    Panel(
        "Tokens of prompts and answers (median)",
        "short",
        (
            *quantiles("adaplex_request_prompt_tokens", "", ONE, 0.5),
            *quantiles("adaplex_request_generated_tokens", "", ONE, 0.5),
        ),
    ),
)

ENGINE = (
    Panel("Rows", "short", tuple(Query(f"sum(adaplex_requests_{s}{ONE})", s) for s in ("running", "waiting"))),
    Panel("Rows by kind of adapter", "short", (Query(f"sum by (kind) (adaplex_rows{ONE})", "{{kind}}"),), stacked=True),
    Panel("Steps", "ops", rates("adaplex_step_seconds_count", "phase", ONE)),
    Panel("Time of a step", "s", quantiles("adaplex_step_seconds", "phase", ONE, 0.5, 0.95)),
    Panel(
        "Share of time in steps",
        "percentunit",
        rates("adaplex_step_seconds_sum", "phase", ONE),
        "What is missing to 1 is idleness.",
        stacked=True,
    ),
    Panel(
        "In a step (mean)",
        "short",
        (mean("adaplex_step_rows", ONE, "rows"), mean("adaplex_step_adapters", ONE, "different adapters")),
    ),
    Panel("Tokens of a step", "short", quantiles("adaplex_step_tokens", "", ONE, 0.5, 0.95)),
    Panel(
        "Rows in steps",
        "ops",
        tuple(
            Query(f"sum(rate(adaplex_step_{kind}_rows_total{ONE}{RATE}))", legend)
            for kind, legend in (("prefill", "prefill"), ("decode", "decode"), ("base", "of these without an adapter"))
        ),
    ),
    Panel(
        "KV cache",
        "percentunit",
        tuple(
            Query(f"sum(adaplex_kv_pages_{part}{ONE}) / sum(adaplex_kv_pages_capacity{ONE})", legend)
            for part, legend in (("used", "held by rows"), ("cached", "prefix cache alone"))
        ),
        stacked=True,
    ),
    Panel(
        "Prefix cache hits",
        "percentunit",
        (
            Query(
                f"sum(rate(adaplex_prefix_hit_tokens_total{ONE}{RATE}))"
                f" / sum(rate(adaplex_prefix_query_tokens_total{ONE}{RATE}))",
                "tokens found",
            ),
        ),
    ),
    Panel("Preemptions", "ops", (Query(f"sum(rate(adaplex_preemptions_total{ONE}{RATE}))", "rows"),)),
    Panel(
        "Adapters",
        "short",
        tuple(
            Query(f"sum(adaplex_{name}{ONE})", legend)
            for name, legend in (
                ("adapters_registered", "registered"),
                ("adapters_resident", "on the device"),
                ("adapter_slots_capacity", "slots"),
            )
        ),
    ),
    Panel(
        "Adapters brought and evicted",
        "ops",
        tuple(Query(f"sum(rate(adaplex_adapter_{what}_total{ONE}{RATE}))", what) for what in ("loads", "evictions")),
    ),
    Panel("Time to bring an adapter", "s", quantiles("adaplex_adapter_swap_seconds", "stage", ONE, 0.5, 0.95)),
    Panel(
        "Device room for adapters",
        "percentunit",
        (Query(f"sum(adaplex_adapter_rank_rows_used{ONE}) / sum(adaplex_adapter_rank_rows_capacity{ONE})", "taken"),),
    ),
    Panel(
        "Host memory",
        "bytes",
        (
            Query(f"sum(adaplex_engine_resident_memory_bytes{ONE})", "engine"),
            Query('sum(process_resident_memory_bytes{job="adaplex", instance=~"$instance"})', "API"),
            Query(f"sum(adaplex_adapter_host_bytes{ONE})", "of these adapters"),
        ),
    ),
    Panel("Engine restarts", "short", (Query(f"sum(increase(adaplex_engine_restarts_total{ONE}[1h]))", "last hour"),)),
    Panel(
        "Ready",
        "short",
        (Query(f"adaplex_ready{ONE}", "{{instance}} ready"), Query(f"adaplex_engine_up{ONE}", "{{instance}} engine")),
    ),
)

TRAINING = (
    Panel("Jobs", "short", (Query(f"sum by (status) (adaplex_training_jobs{ONE})", "{{status}}"),)),
    Panel("Loss", "none", (Query(f"adaplex_training_loss{ONE}", "{{adapter}}"),), "Of the last step that was told."),
    Panel("Step", "short", (Query(f"adaplex_training_step{ONE}", "{{adapter}}"),)),
    Panel("Tokens trained", "short", (Query(f"adaplex_training_tokens{ONE}", "{{adapter}}"),)),
    Panel("Time left", "s", (Query(f"adaplex_training_seconds_left{ONE}", "{{adapter}}"),)),
    Panel(
        "Requests while jobs run",
        "s",
        quantiles("adaplex_inter_token_latency_seconds", "", ONE, 0.95),
        "Between two tokens: a job shares the machine with those who are served.",
    ),
)

DASHBOARDS = {
    "latency": ("Adaplex: latency per adapter", LATENCY, True),
    "engine": ("Adaplex: engine", ENGINE, False),
    "training": ("Adaplex: training", TRAINING, False),
}


def dashboard(uid: str, title: str, panels: tuple[Panel, ...], by_adapter: bool) -> dict[str, Any]:
    """The JSON model."""
    variables = [_variable("instance", "adaplex_ready", "instance")]
    if by_adapter:
        variables.append(_variable("adapter", 'adaplex_requests_total{instance=~"$instance"}', "adapter"))
    return {
        "uid": f"adaplex-{uid}",
        "title": title,
        "tags": ["adaplex"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "links": [{"type": "dashboards", "tags": ["adaplex"], "title": "Adaplex", "asDropdown": False}],
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _variable(name: str, metric: str, label: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "prometheus"},
        "query": f"label_values({metric}, {label})",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
    custom = {"fillOpacity": 30 if panel.stacked else 5, "showPoints": "never", "stacking": stacking}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.told,
        "datasource": {"type": "prometheus", "uid": "prometheus"},
        "gridPos": {"x": number % 3 * WIDTH, "y": number // 3 * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query.expr, "legendFormat": query.legend}
            for i, query in enumerate(panel.queries)
        ],
    }


def files() -> dict[Path, str]:
    """What belongs in each file."""
    return {
        FOLDER / f"{uid}.json": json.dumps(dashboard(uid, *parts), indent=1) + "\n" for uid, parts in DASHBOARDS.items()
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
