"""Which modules an adapter's config says that it adapts: the fields that several kinds share, as PEFT writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adaplex_adapters.peft_fields import CONFIG_FILE
from adaplex_adapters.problems import shown

TARGET_FIELDS = frozenset(
    {"exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "target_modules"}
)
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True)
class Targeting:
    """targets: module names, or one regular expression (or "all-linear"). layers: None for all. saved: names of
    modules that are replaced as a whole (modules_to_save), which PEFT never adapts besides.
    """

    targets: tuple[str, ...] | str
    exclude: tuple[str, ...] | str
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]

    @property
    def all_linear(self) -> bool:
        """Whether every linear but the head is meant."""
        return isinstance(self.targets, str) and self.targets.lower() == "all-linear"


def target_problems(fields: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the fields as such."""
    targets = fields.get("target_modules")
    if not targets:
        yield (
            f"{CONFIG_FILE} has target_modules={shown(targets)}, so it does not say which modules it adapts; name them "
            "there (PEFT writes them when it saves an adapter)."
        )
    for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = fields.get(name)
        names = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, str) for item in names):
            yield f"{CONFIG_FILE} has {name}={shown(value)}; it must be text or a list of texts."
        elif name == "modules_to_save":
            for item in names:
                if not _MODULE_NAME.fullmatch(item):
                    yield f"{CONFIG_FILE} has {shown(item)} in modules_to_save; only a module's plain name is read."
    layers = fields.get("layers_to_transform")
    if (
        isinstance(targets, str)
        and targets.lower() != "all-linear"
        and fields.get("layers_to_transform") not in (None, [])
    ):
        yield f"{CONFIG_FILE} has layers_to_transform beside an expression in target_modules: remove one."
    layer_list = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(type(layer) is int for layer in layer_list):
        yield f"{CONFIG_FILE} has layers_to_transform={shown(layers)}; it must be a layer's number or a list of them."


def targeting(fields: Mapping[str, Any]) -> Targeting:
    """The fields, once `target_problems` found nothing."""
    layers = fields.get("layers_to_transform")
    saved = fields.get("modules_to_save") or []
    return Targeting(
        targets=_names(fields["target_modules"]),
        exclude=_names(fields.get("exclude_modules")),
        layers=None if layers is None or layers == [] else tuple(layers) if isinstance(layers, list) else (layers,),
        layers_pattern=tuple([p] if isinstance(p := fields.get("layers_pattern"), str) and p else p or []),
        saved=(saved,) if isinstance(saved, str) else tuple(saved),
    )


def _names(value: Any) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else tuple(value or ())
