"""Which modules PEFT would adapt, and with which rank and alpha: PEFT's matching rules, with bounded work.

The rules are those of PEFT 0.21 (`check_target_module_exists` and `get_pattern_key` there). Expressions without any
operator are run by Python's `re`, which takes little time on them; all others by our own state machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from adaplex_adapters.automaton import Automaton, PatternRefused, WorkBudget
from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.peft_fields import CONFIG_FILE
from adaplex_adapters.problems import refuse, shown
from adaplex_adapters.targeting import Targeting

_PLAIN = re.compile(r"(?:[A-Za-z0-9_\-]|\\?\.){1,512}")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+")
_MAX_PATTERNS = 2_000

T = TypeVar("T")
Matcher = Callable[[str], bool]


def expression(pattern: str, field: str, budget: WorkBudget, *, after_any_dot: bool = False) -> Matcher:
    """A function that tells whether `pattern` matches a whole module path, as re.fullmatch would.

    after_any_dot: it may also match only what follows a dot of the path, the rule of rank_pattern. `field` names the
    config field in messages. Raises InvalidAdapter when the pattern is refused, now or when the budget runs out.
    """
    wrapped = rf"(?:.*\.)?(?:{pattern})$" if after_any_dot else pattern
    if _PLAIN.fullmatch(pattern):
        plain = re.compile(wrapped)
        return lambda path: plain.fullmatch(path) is not None
    try:
        if after_any_dot:
            Automaton(pattern)  # by itself too, so that unbalanced brackets cannot pair with ours
        automaton = Automaton(wrapped)
    except PatternRefused as error:
        raise _refused(pattern, field, error) from None

    def matches(path: str) -> bool:
        try:
            return automaton.fullmatch(path, budget)
        except PatternRefused as error:
            raise _refused(pattern, field, error) from None

    return matches


def _refused(pattern: str, field: str, error: PatternRefused) -> InvalidAdapter:
    return refuse(f"{CONFIG_FILE}: the expression {shown(pattern)} in {field} is refused: {error}.")


def by_pattern(
    patterns: Mapping[str, T], default: T, field: str, budget: WorkBudget, paths: Iterable[str]
) -> dict[str, T]:
    """Each module path's value: of the first pattern that matches it, else of the key equal to it, else `default`."""
    if len(patterns) > _MAX_PATTERNS:
        raise refuse(f"{CONFIG_FILE} has {len(patterns)} entries in {field}; at most {_MAX_PATTERNS} are read.")
    matchers = [(expression(key, field, budget, after_any_dot=True), value) for key, value in patterns.items()]
    found = {}
    for path in paths:
        found[path] = next((value for matches, value in matchers if matches(path)), patterns.get(path, default))
    return found


class TargetRule:
    """Which linears of a base an adapter's config targets."""

    def __init__(self, config: Targeting, budget: WorkBudget) -> None:
        self._config = config
        self._names = config.targets if isinstance(config.targets, tuple) else ()
        self._matches: Matcher | None = None
        if isinstance(config.targets, str) and not config.all_linear:
            self._matches = expression(config.targets, "target_modules", budget)
        self._excludes: Matcher | None = None
        if isinstance(config.exclude, str) and config.exclude:
            self._excludes = expression(config.exclude, "exclude_modules", budget)
        for pattern in config.layers_pattern:
            if not _PLAIN_NAME.fullmatch(pattern):
                raise refuse(
                    f"{CONFIG_FILE} has layers_pattern {shown(pattern)}; only a plain name ('layers') is read."
                )

    def targets(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Those of `paths` that the config targets, in their order."""
        return tuple(path for path in paths if not self._excluded(path) and self._targeted(path))

    def names_without(self, targeted: Iterable[str]) -> tuple[str, ...]:
        """The names in target_modules that target none of these paths."""
        reached: set[str] = set()
        for path in targeted:
            parts = path.split(".")
            reached.update(".".join(parts[at:]) for at in range(len(parts)))
        return tuple(name for name in self._names if name not in reached)

    def _excluded(self, path: str) -> bool:
        if any(f".{name}." in f".{path}." for name in self._config.saved):
            return True
        if self._excludes is not None:
            return self._excludes(path)
        return any(_names(name, path) for name in self._config.exclude)

    def _targeted(self, path: str) -> bool:
        if self._config.all_linear:
            return True
        if self._matches is not None:
            return self._matches(path)
        if path in self._names:
            return True  # a full path is not subject to layers_to_transform
        return any(path.endswith(f".{name}") for name in self._names) and self._in_layers(path)

    def _in_layers(self, path: str) -> bool:
        if self._config.layers is None:
            return True
        return _layer_of(path, self._config.layers_pattern) in self._config.layers


def _names(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _layer_of(path: str, layers_pattern: tuple[str, ...]) -> int | None:
    """The number after a segment of one of these names, in their order; without names, the first after two segments."""
    parts = path.split(".")
    numbered = [at for at in range(1, len(parts) - 1) if parts[at].isdecimal()]
    if not layers_pattern:
        return next((int(parts[at]) for at in numbered if at >= 2), None)
    for pattern in layers_pattern:
        for at in numbered:
            if parts[at - 1] == pattern:
                return int(parts[at])
    return None
