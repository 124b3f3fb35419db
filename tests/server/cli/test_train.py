from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from adaplex_adapters.catalogue import Catalogue, peek
from adaplex_adapters.errors import InvalidRequest, StartupError, Unavailable
from adaplex_adapters.store import AdapterStore
from adaplex_server.cli import train
from support.tiny_base import make_base, make_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "tiny", make_tokenizer())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} ", "completion": str(i)}) + "\n" for i in range(12)))
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command in a folder of its own, where no server answers; returns typer's result, errors raised."""
    monkeypatch.setenv("ADAPLEX_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("ADAPLEX_SERVER", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "DEFAULT_SERVER", "http://127.0.0.1:9")
    application = typer.Typer()
    application.command()(train.train_command)

    def run(*arguments: object) -> Any:
        result = CliRunner().invoke(application, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def test_a_trained_adapter_is_registered_in_the_data_folder(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    result = run(data, "--name", "count", "--base", base, "--max-steps", 2, "--rank", 4)
    assert result.exit_code == 0, result.output
    assert "held out before" in result.output and "registered count" in result.output
    (entry,) = peek(tmp_path / "data" / "tiny" / "catalogue.sqlite3")
    assert (entry.name, entry.source, entry.spec.rank) == ("count", "trainer", 4)
    assert AdapterStore(tmp_path / "data" / "tiny" / "adapters").contains(entry.spec.revision)
    assert (tmp_path / "count" / "adapter_config.json").is_file()


def test_with_a_server_on_the_data_folder_the_adapter_is_kept_and_the_way_told(
    run: Any, base: Path, data: Path, tmp_path: Path
) -> None:
    held = Catalogue(tmp_path / "data" / "tiny" / "catalogue.sqlite3")
    try:
        with pytest.raises(StartupError, match="adaplex adapters add"):
            run(data, "--name", "count", "--base", base, "--max-steps", 1)
    finally:
        held.close()
    assert (tmp_path / "count" / "adapter_model.safetensors").is_file()


def test_a_named_server_must_answer(run: Any, base: Path, data: Path) -> None:
    with pytest.raises(Unavailable, match="no server answers"):
        run(data, "--name", "count", "--base", base, "--max-steps", 1, "--server", "http://127.0.0.1:9")


def test_into_the_folder_of_a_server(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    run(data, "--name", "count", "--base", base, "--max-steps", 1, "--adapters", tmp_path / "served")
    assert (tmp_path / "served" / "count" / "adapter_config.json").is_file()
    assert not (tmp_path / "data").exists()


def test_bad_input_is_refused_before_anything_is_loaded(run: Any, data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x", "completion": "y"}\n{"prompt": 1}\n')
    nowhere = ("--base", tmp_path / "no-base")
    for arguments, said in (
        ((bad, "--name", "x", *nowhere), "line 2"),
        ((data, "--name", "../x", *nowhere), "name"),
        ((data, "--name", "x", "--rank", 0, *nowhere), "rank must be"),
        ((data, "--name", "x", "--out", "a", "--adapters", "b", *nowhere), "not both"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            run(*arguments)
    with pytest.raises(StartupError, match="no-base"):
        run(data, "--name", "x", *nowhere)


def test_the_help_names_every_option_of_the_trainer(run: Any) -> None:
    shown = run("--help").output
    for option in ("--rank", "--alpha", "--lr", "--epochs", "--max-steps", "--batch-size", "--accumulation", "--seed"):
        assert option in shown
