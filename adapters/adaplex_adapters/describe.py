"""What is in an adapter's folder, and everything that keeps it from being served: for `adaplex adapters check`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.errors import AdaplexError, InvalidAdapter
from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.reader import read_any
from adaplex_adapters.spec import Adapter, AdapterSpec, LoraModule


@dataclass(frozen=True)
class AdapterReport:
    """adapter: None when the files cannot be read at all. modules: low-rank modules, factors, bottlenecks and replaced
    weights together. ranks, scalings: the different ones, ascending.

    problems: all that was found in the first stage that failed; empty when the adapter can be served on the base.
    warnings: what is served but looks like a mistake.
    """

    adapter: Adapter | None
    modules: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def spec(self) -> AdapterSpec | None:
        """What one tells about it."""
        return self.adapter.spec if self.adapter is not None else None


def check_adapter(folder: Path, base: BaseShape | None, limits: ReadLimits | None = None) -> AdapterReport:
    """Read the folder as the server would; never raises for a bad adapter. base: None checks no fit."""
    try:
        unfitted = read_any(folder, limits or ReadLimits())
    except AdaplexError as error:
        return AdapterReport(None, 0, (), (), _problems(error), ())
    adapter = unfitted.adapter
    problems: tuple[str, ...] = ()
    if base is not None:
        try:
            adapter = unfitted.fitted(base)
        except AdaplexError as error:
            problems = _problems(error)
    return AdapterReport(
        adapter=adapter,
        modules=len(adapter.modules) + len(adapter.scales) + len(adapter.bottlenecks) + len(adapter.replaced),
        ranks=tuple(sorted({module.a.shape[0] for module in adapter.modules.values()})),
        scalings=tuple(sorted({module.scaling for module in adapter.modules.values()})),
        problems=problems,
        warnings=_warnings(adapter),
    )


def _problems(error: AdaplexError) -> tuple[str, ...]:
    return error.problems if isinstance(error, InvalidAdapter) else (error.message,)


def _warnings(adapter: Adapter) -> tuple[str, ...]:
    """Parts that change nothing. A DoRA's magnitude does something by itself."""
    changes = [
        *(_changes(module) for module in adapter.modules.values()),
        *(bool((scale.vector != 1).any()) for scale in adapter.scales.values()),
        *(bool(one.scaling.any() and (one.up.any() or one.up_bias.any())) for one in adapter.bottlenecks.values()),
    ]
    whole = adapter.soft_prompt is not None or adapter.prefix is not None or adapter.replaced
    idle = changes.count(False)
    if not idle:
        return ()
    if idle == len(changes) and not whole:
        return ("Every part is such that the adapter does nothing; the server refuses to load it.",)
    return (f"{idle} of {len(changes)} modules do nothing, since a matrix or scaling is zero or every factor is one.",)


def _changes(module: LoraModule) -> bool:
    return module.magnitude is not None or bool(module.scaling and module.a.any() and module.b.any())
