"""The command line offers each setting, and passes on only what was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from adaplex_server.cli.options import with_settings
from adaplex_server.settings import ServerSettings

seen: list[tuple[Path | None, dict[str, Any]]] = []


def record(config: Path | None, flags: dict[str, Any]) -> None:
    """What the command is for."""
    seen.append((config, flags))


@pytest.fixture
def app() -> typer.Typer:
    seen.clear()
    application = typer.Typer()
    application.command()(with_settings(record))
    return application


def test_help_shows_every_setting_with_its_variable(app: typer.Typer) -> None:
    text = CliRunner(env={"COLUMNS": "250", "TERMINAL_WIDTH": "250"}).invoke(app, ["--help"]).output
    for name in ServerSettings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
        assert f"ADAPLEX_{name.upper()}" in text


def test_only_given_options_are_passed_on(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["--max-rows", "7", "--no-prefix-cache", "--config", "x.toml"])
    assert result.exit_code == 0, result.output
    assert seen == [(Path("x.toml"), {"max_rows": "7", "prefix_cache": False})]


def test_an_unknown_option_is_refused(app: typer.Typer) -> None:
    assert CliRunner().invoke(app, ["--max-row", "7"]).exit_code == 2
    assert not seen
