"""DESIGN.md names owners; each of them exists under that name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OWNERS = re.findall(r"`([a-z_0-9.]+)\.([A-Z]\w+)`", (ROOT / "DESIGN.md").read_text())


def source_of(module: str) -> Path:
    folder = "adapters" if module.startswith("adaplex_adapters.") else "server/adaplex_server"
    return (ROOT / folder / module.replace(".", "/")).with_suffix(".py")


@pytest.mark.parametrize(("module", "name"), OWNERS, ids=lambda part: part)
def test_an_owner_exists(module: str, name: str) -> None:
    classes = {node.name for node in ast.parse(source_of(module).read_text()).body if isinstance(node, ast.ClassDef)}
    assert name in classes


def test_owners_are_found() -> None:
    assert len(OWNERS) > 10
