"""The trainer's options as flags, made from `TrainOptions`, so that the list of options exists once.

Other trainers' names work too (`--per_device_train_batch_size 4`, `--use_dora`, `--bf16 True`): they are turned into
`--set NAME=VALUE`, which takes any of them.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.option_names import FIELDS, is_switch, known_names, options_from
from adaplex_adapters.training.options import TrainOptions

_TYPES = typing.get_type_hints(TrainOptions)
_TRUTHS = ("true", "false", "yes", "no", "1", "0")


class TrainCommand(TyperCommand):
    """Understands the names that users of other trainers type."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        return super().parse_args(ctx, own_spelling(args, own))


def own_spelling(args: Sequence[str], own: set[str]) -> list[str]:
    """The arguments with other trainers' flags as `--set NAME=VALUE`; everything else stays as it is."""
    known = known_names()
    found: list[str] = []
    rest = list(args)
    while rest:
        argument = rest.pop(0)
        flag, given, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        switched = name in known and is_switch(name) and (given or (rest[:1] and rest[0].lower() in _TRUTHS))
        if not argument.startswith("--") or (flag in own and not switched):
            found.append(argument)
        elif switched:
            found += ["--set", f"{name}={value if given else rest.pop(0)}"]
        elif f"--{name.replace('_', '-')}" in own:
            found.append(f"--{name.replace('_', '-')}{given}{value}")
        elif name in known:
            if not given:
                value = _value_after(name, rest)
            found += ["--set", f"{name}={value}"]
        else:
            found.append(argument)
    return found


def with_train_options(run: Callable[..., None]) -> Callable[..., None]:
    """A command function with run's own parameters and one flag an option; run gets `options`, built and checked."""

    def command(**given: Any) -> None:
        config, changes = given.pop("config"), given.pop("set")
        flags = {name: given.pop(name) for name in FIELDS}
        run(**given, options=chosen_options(config, flags, changes))

    own = [p for p in inspect.signature(run, eval_str=True).parameters.values() if p.name != "options"]
    parameters = [*own, _config_parameter(), _set_parameter(), *(_parameter(name) for name in FIELDS)]
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    )
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__, command.__name__ = run.__doc__, run.__name__
    return command


def chosen_options(config: Path | None, flags: dict[str, Any], changes: Sequence[str]) -> TrainOptions:
    """The TOML file's options, changed by those that were given on the command line. Raises InvalidRequest."""
    options = options_from({} if config is None else _toml(config))
    named: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    for change in changes:
        name, given, value = change.partition("=")
        if not given:
            raise InvalidRequest(f"--set takes NAME=VALUE, not {change!r}", param=name)
        named[name] = value
    return options_from(named, options)


def _toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidRequest(f"the options in {path} cannot be read: {error}", param="config") from error


def _value_after(name: str, rest: list[str]) -> str:
    """The value of a flag; a switch may stand alone."""
    if is_switch(name) and (not rest or rest[0].lower() not in _TRUTHS):
        return "true"
    return rest.pop(0) if rest else ""


def _parameter(name: str) -> inspect.Parameter:
    field, kind = FIELDS[name], _TYPES[name]
    flag = f"--{name.replace('_', '-')}"
    switch = is_switch(name)
    names = [f"{flag}/--no-{flag[2:]}"] if switch else [flag, *(["--lr"] if name == "learning_rate" else [])]
    option = typer.Option(
        *names,
        help=f"{field.metadata['help']}{_shown_default(field.default)}",
        rich_help_panel=field.metadata["group"],
        show_default=False,
        metavar=None if switch else _metavar(kind, field.metadata["choices"]),
    )
    annotation = Annotated[bool | None if switch else str | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _config_parameter() -> inspect.Parameter:
    option = typer.Option("--config", help="TOML file with any of the options below, or other trainers' names of them.")
    annotation = Annotated[Path | None, option]
    return inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _set_parameter() -> inspect.Parameter:
    option = typer.Option("--set", metavar="NAME=VALUE", help="An option by any of its names; may be repeated.")
    annotation = Annotated[list[str], option]
    return inspect.Parameter("set", inspect.Parameter.KEYWORD_ONLY, default=[], annotation=annotation)


def _shown_default(default: Any) -> str:
    if default is None or default == ():
        return ""
    shown = {True: "yes", False: "no"}[default] if isinstance(default, bool) else default
    return f" (default: {','.join(shown) if isinstance(shown, tuple) else shown})"


def _metavar(kind: Any, choices: tuple[str, ...]) -> str:
    if choices:
        return "|".join(choices)
    if kind == tuple[str, ...]:
        return "A,B"
    wanted = next(t for t in (typing.get_args(kind) or (kind,)) if t is not type(None))
    return {int: "N", float: "X"}.get(wanted, "TEXT")
