"""What is common to the configs of all of PEFT's kinds: fields that are read, known to be harmless, or refused.

A config is what a stranger claims. A field that could change the answers and that nobody here reads is a refusal, so
that an adapter is never served as something else than what was trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adaplex_adapters.problems import shown

CONFIG_FILE = "adapter_config.json"
_MAX_BASE_NAME = 512

COMMON_READ = frozenset({"base_model_name_or_path", "peft_type"})
# How it was trained or made, and by what.
COMMON_HARMLESS = frozenset({"auto_mapping", "inference_mode", "peft_version", "revision", "task_type"})


@dataclass(frozen=True)
class FieldRules:
    """Of one kind: the fields that are read, those that cannot change an answer, and why others are refused when set.
    "Set" is anything but null, false, empty or zero.
    """

    read: frozenset[str]
    harmless: frozenset[str]
    refused: Mapping[str, str]


def field_problems(fields: Mapping[str, Any], rules: FieldRules) -> Iterator[str]:
    """What no adapter of this kind may set."""
    for name, value in fields.items():
        if name in rules.refused and value:
            yield f"{CONFIG_FILE} sets {name}={shown(value)}: {rules.refused[name]}."
        elif not value or name in rules.refused:
            continue
        elif not any(name in known for known in (rules.read, rules.harmless, COMMON_READ, COMMON_HARMLESS)):
            yield (
                f"{CONFIG_FILE} sets {shown(name)}={shown(value)}, which this version does not know, so it cannot tell "
                "whether the adapter would be served rightly; remove the field if it has no effect."
            )


def base_model_problem(fields: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the name of the base."""
    base = fields.get("base_model_name_or_path")
    if base is not None and not (isinstance(base, str) and len(base) <= _MAX_BASE_NAME and base.isprintable()):
        yield f"{CONFIG_FILE} has the impossible base_model_name_or_path {shown(base)}."


def count_problem(name: str, value: Any, most: int) -> Iterator[str]:
    """Unless value is a whole number from 1 to `most`."""
    if type(value) is not int or not 1 <= value <= most:
        yield f"{CONFIG_FILE} has {name}={shown(value)}; it must be a whole number from 1 to {most}."


def flag_problem(fields: Mapping[str, Any], *names: str) -> Iterator[str]:
    """Unless each of these, where it is set, is true or false."""
    for name in names:
        if not isinstance(fields.get(name, False), bool):
            yield f"{CONFIG_FILE} has {name}={shown(fields[name])}; it must be true or false."


def number_problem(name: str, value: Any, most: float) -> Iterator[str]:
    """Unless value is a finite number of at most `most`, either sign."""
    if type(value) not in (int, float) or not abs(value) <= most or not math.isfinite(value):
        yield f"{CONFIG_FILE} has {name}={shown(value)}; it must be a finite number of at most {most:g}."
