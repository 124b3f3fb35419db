"""Imports point one way: http_api, grpc_api → service → engine → model → kernels; server → adapters → proto; never
back.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"adaplex_proto": 0, "adaplex_adapters": 1, "adaplex_server": 2, "adaplex_loadtest": 2}
# Lower numbers know nothing of higher ones. What is not listed (cli, settings) composes and may import everything.
SERVER_LAYERS = {
    "kernels": 0,
    "model": 1,
    "bases": 2,
    "engine": 3,
    "service": 4,
    "http_api": 5,
    "grpc_api": 5,
    "bench": 6,
}
# Nouns that every layer of the server may use.
SHARED = {"caller", "request_scope", "tls", "vocabulary"}

Edge = tuple[Path, str]


def sources() -> list[Path]:
    folders = ("proto", "adapters", "server", "loadtest")
    return [p for f in folders for p in sorted((ROOT / f).rglob("*.py")) if "_pb2" not in p.name]


def imported_modules(path: Path) -> list[str]:
    """Every adaplex module that a file imports anywhere, also inside functions."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [m for m in found if m.startswith("adaplex_")]


def layer_of(parts: tuple[str, ...]) -> int | None:
    return SERVER_LAYERS.get(parts[1]) if len(parts) > 1 and parts[0] == "adaplex_server" else None


def violations(path: Path, module: tuple[str, ...]) -> list[str]:
    wrong = []
    for target in imported_modules(path):
        parts = tuple(target.split("."))
        if PACKAGES[parts[0]] > PACKAGES[module[0]]:
            wrong.append(f"{path}: {module[0]} imports {target}")
        ours, theirs = layer_of(module), layer_of(parts)
        if module[0] == parts[0] == "adaplex_server" and ours is not None:
            if theirs is None and parts[1] not in SHARED:
                wrong.append(f"{path}: {'.'.join(module[:2])} imports the composing module {target}")
            if theirs is not None and (theirs > ours or (theirs == ours and parts[1] != module[1])):
                wrong.append(f"{path}: {module[1]} imports {target}, which is not below it")
    return wrong


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    module = path.relative_to(ROOT).with_suffix("").parts[1:]
    assert violations(path, module) == []


def test_a_wrong_import_would_be_seen(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from adaplex_server.engine import scheduler\nimport adaplex_server.http_api.app\n")
    assert len(violations(bad, ("adaplex_server", "kernels", "bad"))) == 2
    assert len(violations(bad, ("adaplex_adapters", "bad"))) == 2


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_owns(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
