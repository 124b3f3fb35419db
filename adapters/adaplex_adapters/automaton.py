"""Matching a regular expression from a stranger in bounded time and memory: a state machine instead of backtracking.

PEFT's configs may name modules by Python regular expressions, and a backtracking engine can be made to run for ever on
them (a time-out does not help with engines that take memory without end meanwhile). Here the expression is parsed by
Python's own parser, so that its syntax means what PEFT's `re` takes it to mean, and run as a Thompson machine (K.
Thompson, "Regular Expression Search Algorithm", 1968): the work is at most states times characters, and both are
limited. Look-around is run as a machine of its own at each place. What such a machine cannot express (back references,
atomic groups, possessive repeats) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

MAX_LENGTH = 4096
MAX_STATES = 4000
MAX_NESTING = 40

Test = Callable[[str], bool]
Condition = Callable[[str, int], bool]


class PatternRefused(ValueError):
    """The expression is invalid, too long, too complex, or uses what a state machine cannot do."""


class WorkBudget:
    """How many state visits all matches of one adapter may take together (a million is about a second)."""

    def __init__(self, visits: int = 3_000_000) -> None:
        self._left = visits

    def spend(self, visits: int) -> None:
        """Take `visits` from the budget; PatternRefused when it is used up."""
        self._left -= visits
        if self._left < 0:
            raise PatternRefused("its expressions take too long to match; name the modules plainly instead")


class Automaton:
    """One compiled expression. Answers whether it matches a whole text; keeps no state between calls but a cache."""

    def __init__(self, pattern: str) -> None:
        self._free: list[list[tuple[Condition | None, int]]] = []
        self._steps: list[list[tuple[Test, int]]] = []
        self._nesting = 0
        self._start = self._state()
        tree, self._ignore_case = _parse(pattern)
        self._accept = self._sequence(tree, self._start)
        self._budget = WorkBudget()
        self._pure = all(condition is None for edges in self._free for condition, _ in edges)
        self._cache: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def fullmatch(self, text: str, budget: WorkBudget) -> bool:
        """Whether the expression matches all of `text`, as re.fullmatch would. PatternRefused when the budget ends."""
        self._budget = budget
        return len(text) in self._ends(self._start, self._accept, text, 0)

    def _ends(self, start: int, accept: int, text: str, begin: int) -> set[int]:
        """Every position where a match that starts at `begin` may end."""
        ends = set()
        active = self._closure((start,), text, begin)
        for at in range(begin, len(text) + 1):
            if accept in active:
                ends.add(at)
            if at == len(text) or not active:
                break
            active = self._advance(active, text, at)
        return ends

    def _advance(self, active: frozenset[int], text: str, at: int) -> frozenset[int]:
        char = text[at]
        if self._pure and (known := self._cache.get((active, char))) is not None:
            self._budget.spend(1)
            return known
        self._budget.spend(len(active))
        moved = [to for state in active for test, to in self._steps[state] if test(char)]
        after = self._closure(moved, text, at + 1)
        if self._pure and len(self._cache) < 10_000:
            self._cache[active, char] = after
        return after

    def _closure(self, states: Iterable[int], text: str, at: int) -> frozenset[int]:
        found = set(states)
        waiting = list(found)
        while waiting:
            for condition, to in self._free[waiting.pop()]:
                if to not in found and (condition is None or condition(text, at)):
                    found.add(to)
                    waiting.append(to)
        self._budget.spend(len(found))
        return frozenset(found)

    # Building: each method adds states for a node that begins in state `at` and returns the state in which it ends.

    def _state(self) -> int:
        if len(self._free) >= MAX_STATES:
            raise PatternRefused(f"it needs more than {MAX_STATES} states; write it shorter")
        self._free.append([])
        self._steps.append([])
        return len(self._free) - 1

    def _sequence(self, nodes: Iterable[Any], at: int) -> int:
        self._nesting += 1
        if self._nesting > MAX_NESTING:
            raise PatternRefused(f"its groups are nested more than {MAX_NESTING} deep")
        for node, value in nodes:
            at = self._node(node, value, at)
        self._nesting -= 1
        return at

    def _node(self, node: Any, value: Any, at: int) -> int:
        if node in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            end = self._state()
            self._steps[at].append((self._char_test(node, value), end))
            return end
        if node is op.SUBPATTERN:
            _, added, removed, inner = value
            if added or removed:
                raise PatternRefused("it changes flags inside a group")
            return self._sequence(inner, at)
        if node is op.BRANCH:
            end = self._state()
            for branch in value[1]:
                self._free[self._sequence(branch, self._after(at))].append((None, end))
            return end
        if node in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, inner = value
            return self._repeat(least, most, inner, at)
        return self._after(at, self._condition(node, value))

    def _after(self, at: int, condition: Condition | None = None) -> int:
        """A new state, reached from `at` without a character (when the condition holds)."""
        end = self._state()
        self._free[at].append((condition, end))
        return end

    def _repeat(self, least: int, most: int, inner: Any, at: int) -> int:
        for _ in range(least):
            at = self._sequence(inner, self._after(at))
        if most is op.MAXREPEAT:
            begin = self._after(at)
            self._free[self._sequence(inner, begin)].append((None, begin))
            return self._after(begin)
        end = self._state()
        for _ in range(most - least):
            self._free[at].append((None, end))
            at = self._sequence(inner, self._after(at))
        self._free[at].append((None, end))
        return end

    def _condition(self, node: Any, value: Any) -> Condition:
        if node is op.AT:
            return _position(value)
        if node is op.FAILURE:
            return lambda text, at: False
        if node not in (op.ASSERT, op.ASSERT_NOT):
            raise PatternRefused(f"it uses {str(node).lower().replace('_', ' ')}, which is not supported")
        direction, inner = value
        start = self._state()
        accept = self._sequence(inner, start)
        wanted = node is op.ASSERT
        if direction > 0:
            return lambda text, at: bool(self._ends(start, accept, text, at)) == wanted
        width, most = inner.getwidth()
        if width != most:
            raise PatternRefused("it looks behind by no fixed width")
        return lambda text, at: (at >= width and at in self._ends(start, accept, text, at - width)) == wanted

    def _char_test(self, node: Any, value: Any) -> Test:
        test = _plain_test(node, value)
        if not self._ignore_case:
            return test
        if node is op.NOT_LITERAL or (node is op.IN and value[0][0] is op.NEGATE):
            return lambda char: test(char.lower()) and test(char.upper())
        return lambda char: test(char.lower()) or test(char.upper())


def _parse(pattern: str) -> tuple[Any, bool]:
    """The parse tree of Python's own parser, and whether case is ignored."""
    if len(pattern) > MAX_LENGTH:
        raise PatternRefused(f"it has {len(pattern)} characters; at most {MAX_LENGTH} are read")
    try:
        tree = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise PatternRefused(f"it is not a valid expression ({error})") from None
    flags = tree.state.flags & ~int(re.UNICODE)
    if flags & ~int(re.IGNORECASE):
        raise PatternRefused("it sets flags other than (?i)")
    return tree, bool(flags)


def _plain_test(node: Any, value: Any) -> Test:
    if node is op.ANY:
        return lambda char: char != "\n"
    if node is op.LITERAL:
        wanted = chr(value)
        return lambda char: char == wanted
    if node is op.NOT_LITERAL:
        unwanted = chr(value)
        return lambda char: char != unwanted
    negated = value[0][0] is op.NEGATE
    tests = [_member_test(kind, member) for kind, member in value if kind is not op.NEGATE]
    return lambda char: any(test(char) for test in tests) != negated


def _member_test(kind: Any, member: Any) -> Test:
    """One member of a set: a character, a range, or a class such as \\d."""
    if kind is op.LITERAL:
        return lambda char: ord(char) == member
    if kind is op.RANGE:
        low, high = member
        return lambda char: low <= ord(char) <= high
    assert kind is op.CATEGORY, kind
    return _CATEGORIES[member]


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


_CATEGORIES: dict[Any, Test] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    op.CATEGORY_WORD: _is_word,
    op.CATEGORY_NOT_WORD: lambda char: not _is_word(char),
}


def _at_boundary(text: str, at: int) -> bool:
    before = at > 0 and _is_word(text[at - 1])
    after = at < len(text) and _is_word(text[at])
    return before != after


def _position(kind: Any) -> Condition:
    if kind in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
        return lambda text, at: at == 0
    if kind is op.AT_END:
        return lambda text, at: at == len(text) or (at == len(text) - 1 and text[at] == "\n")
    if kind is op.AT_END_STRING:
        return lambda text, at: at == len(text)
    if kind is op.AT_BOUNDARY:
        return _at_boundary
    assert kind is op.AT_NON_BOUNDARY, kind
    return lambda text, at: bool(text) and not _at_boundary(text, at)
