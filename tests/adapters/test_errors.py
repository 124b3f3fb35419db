"""The error tree is whole in its own module, and every error survives the way between processes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from adaplex_adapters.errors import AdaplexError, InternalError, all_errors, error_named
from adaplex_adapters.problems import refusal

ROOT = Path(__file__).parent.parent.parent
NAMES = {kind.__name__ for kind in all_errors()}


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_an_error_is_rebuilt_from_its_name_and_message(kind: type[AdaplexError]) -> None:
    error = error_named(kind.__name__, "what was wrong", retry_after=2.0)
    assert (type(error), error.message, error.retry_after) == (kind, "what was wrong", 2.0)


def test_many_problems_are_rebuilt_too() -> None:
    error = refusal([f"Problem {i}." for i in range(8)])
    assert len(error.problems) == 8 and "And 3 more" in error.message
    assert error_named(type(error).__name__, error.message).message == error.message


def test_an_unknown_name_is_a_bug() -> None:
    assert type(error_named("KeyError", "x")) is InternalError


def test_no_error_of_the_tree_is_defined_elsewhere() -> None:
    """What a process knows of the tree must not depend on what it has imported."""
    strays = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for folder in ("adapters", "server", "loadtest")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "errors.py" or path.parent.name != "adaplex_adapters"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        if any(isinstance(base, ast.Name) and base.id in NAMES for base in node.bases)
    ]
    assert strays == []
