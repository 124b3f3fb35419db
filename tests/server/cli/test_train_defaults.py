"""The command's defaults are the trainer's: two lists, held together here."""

from __future__ import annotations

import inspect

from adaplex_adapters.training.options import TrainOptions
from adaplex_server.cli.train import train_command


def test_the_command_has_the_trainers_options_and_defaults() -> None:
    given = {name: p.default for name, p in inspect.signature(train_command).parameters.items()}
    options = TrainOptions()
    renamed = {"learning_rate": "lr"}
    for field in options.__dataclass_fields__:
        default = given[renamed.get(field, field)]
        assert (default.split(",") if field == "targets" else default) == (
            list(options.targets) if field == "targets" else getattr(options, field)
        ), field
