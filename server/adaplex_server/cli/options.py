"""Command-line options made from `ServerSettings`, so that the list of settings exists once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from adaplex_server.settings import ENV_PREFIX, ServerSettings


def with_settings(run: Callable[[Path | None, dict[str, Any]], None]) -> Callable[..., None]:
    """A command function with one option a setting; it calls run(config file, only the options that were given)."""

    def command(config: Path | None, **options: Any) -> None:
        run(config, {name: value for name, value in options.items() if value is not None})

    parameters = [
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None,
                typer.Option(
                    "--config",
                    help="TOML file with any of these settings, named with _ for - (env: ADAPLEX_CONFIG).",
                    rich_help_panel="Settings",
                ),
            ],
        ),
        *(_parameter(name, info) for name, info in ServerSettings.model_fields.items()),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = run.__doc__
    command.__name__ = run.__name__
    return command


def _parameter(name: str, info: FieldInfo) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    is_switch = info.annotation is bool
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if is_switch else flag,
        help=f"{info.description} [default: {_shown_default(info)}] (env: {ENV_PREFIX}{name.upper()})",
        rich_help_panel=info.title,
        show_default=False,
        metavar=None if is_switch else _metavar(info),
        autocompletion=_completion(info),
    )
    kind = bool if is_switch else str
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _completion(info: FieldInfo) -> Callable[[str], list[str]] | None:
    """What a shell offers for a setting of a few words; None leaves it to the shell, which knows files."""
    if get_origin(info.annotation) is not Literal:
        return None
    words = [str(word) for word in get_args(info.annotation)]

    def offered(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return offered


def _shown_default(info: FieldInfo) -> str:
    if info.default_factory is not None:
        return "$XDG_DATA_HOME/adaplex"
    if isinstance(info.default, ByteSize):
        return info.default.human_readable()
    return {True: "yes", False: "no", None: "none"}.get(info.default, str(info.default))


def _metavar(info: FieldInfo) -> str:
    text = str(info.annotation)
    if "Literal" in text:
        return text[text.index("[") + 1 : text.rindex("]")].replace("'", "").replace(", ", "|")
    for part, name in (("ByteSize", "SIZE"), ("Path", "FOLDER"), ("float", "SECONDS"), ("int", "N")):
        if part in text:
            return name
    return "TEXT"
