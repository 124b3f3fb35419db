"""Trying several settings: every combination of the given values, trained on one loaded base, compared on the same
held-out rows. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.option_names import options_from
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.report.record import TrainResult

MAX_VARIANTS = 64
# The base is loaded once, and rows are split by the seed once: what would change them cannot vary.
_SHARED = ("quantize", "double_quant", "precision", "upcast_base")


def variants_of(sweep: Sequence[str], options: TrainOptions) -> dict[str, TrainOptions]:
    """Name -> options for texts like "rank=4,8,16" and "learning_rate=1e-4,5e-4", every combination of them.

    Raises InvalidRequest naming what is wrong.
    """
    axes: dict[str, list[str]] = {}
    for text in sweep:
        name, given, values = text.partition("=")
        if not given or not values or name in axes:
            raise InvalidRequest(f"--sweep takes NAME=VALUE,VALUE once for each name, not {text!r}", param="sweep")
        if name in _SHARED:
            raise InvalidRequest(f"{name} belongs to the base, which is loaded once; it cannot be swept", param="sweep")
        axes[name] = values.split(",")
    combinations = list(itertools.product(*axes.values()))
    if len(combinations) > MAX_VARIANTS:
        raise InvalidRequest(f"the sweep has {len(combinations)} variants; at most {MAX_VARIANTS} run", param="sweep")
    return {
        "-".join(f"{n}={v}" for n, v in zip(axes, values, strict=True)): options_from(
            dict(zip(axes, values, strict=True)), options
        )
        for values in combinations
    }


def best_of(results: Mapping[str, TrainResult], options: TrainOptions) -> str | None:
    """The variant with the best figure on held-out rows (`best_by`); None where nothing was held out."""
    measured = {name: found for name, found in results.items() if found.held_out_after is not None}
    if not measured:
        return None
    if options.best_by == "loss":
        return min(measured, key=lambda name: measured[name].held_out_after or 0.0)
    return max(measured, key=lambda name: measured[name].metrics_after[options.best_by])
