"""What is in an adapter's folder, and everything that keeps it from being served: for `adaplex adapters check`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.errors import AdaplexError, InvalidAdapter
from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.reader import read_adapter, read_unfitted
from adaplex_adapters.spec import AdapterSpec, LoraAdapter


@dataclass(frozen=True)
class AdapterReport:
    """spec: None when the files cannot be read at all. ranks, scalings: the different ones, ascending.

    problems: all that was found in the first stage that failed; empty when the adapter can be served on the base.
    warnings: what is served but looks like a mistake.
    """

    spec: AdapterSpec | None
    modules: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def check_adapter(folder: Path, base: BaseShape | None, limits: ReadLimits | None = None) -> AdapterReport:
    """Read the folder as the server would; never raises for a bad adapter. base: None checks no fit."""
    limits = limits or ReadLimits()
    try:
        adapter = read_unfitted(folder, limits)
    except AdaplexError as error:
        return AdapterReport(None, 0, (), (), _problems(error), ())
    problems: tuple[str, ...] = ()
    if base is not None:
        try:
            adapter = read_adapter(folder, base, limits)
        except AdaplexError as error:
            problems = _problems(error)
    return AdapterReport(
        spec=adapter.spec,
        modules=len(adapter.modules),
        ranks=tuple(sorted({module.a.shape[0] for module in adapter.modules.values()})),
        scalings=tuple(sorted({module.scaling for module in adapter.modules.values()})),
        problems=problems,
        warnings=_warnings(adapter),
    )


def _problems(error: AdaplexError) -> tuple[str, ...]:
    return error.problems if isinstance(error, InvalidAdapter) else (error.message,)


def _warnings(adapter: LoraAdapter) -> tuple[str, ...]:
    idle = [
        path
        for path, module in adapter.modules.items()
        if module.scaling == 0 or not module.b.any() or not module.a.any()
    ]
    if not idle:
        return ()
    if len(idle) == len(adapter.modules):
        return ("Every module's A, B or scaling is zero, so the adapter does nothing; the server refuses to load it.",)
    return (f"{len(idle)} of {len(adapter.modules)} modules do nothing, since their A, B or scaling is zero.",)
