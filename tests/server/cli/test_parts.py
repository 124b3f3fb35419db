"""Which adapters are registered at start, and where each base keeps its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaplex_adapters.errors import StartupError
from adaplex_server.cli.demo import demo_adapters
from adaplex_server.cli.parts import chat_template, data_folder, served_names, startup_adapters
from adaplex_server.settings import ServerSettings


def test_subfolders_are_adapters_under_their_own_names(tmp_path: Path) -> None:
    for name in ("b", "a", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / "a-file").touch()
    found = startup_adapters(ServerSettings(adapters=tmp_path))
    assert list(found.items()) == [("a", tmp_path / "a"), ("b", tmp_path / "b")]


def test_the_demo_is_served_only_where_nothing_else_was_asked_for(tmp_path: Path) -> None:
    assert startup_adapters(ServerSettings()) == demo_adapters()
    assert startup_adapters(ServerSettings(base="some-base")) == {}


def test_the_demo_adapters_of_the_checkout_are_found() -> None:
    assert set(demo_adapters()) == {"date-iso", "itn-en", "language-id", "past-tense", "tsql-postgres"}


def test_a_chat_template_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}")
    assert chat_template(file) == "{{ messages }}"
    assert chat_template(None) is None
    with pytest.raises(StartupError, match="--chat-template"):
        chat_template(tmp_path / "none.jinja")


def test_each_base_has_a_data_folder_of_its_own(tmp_path: Path) -> None:
    settings = ServerSettings(data_dir=tmp_path)
    assert data_folder(settings, "one") != data_folder(settings, "another")


def test_the_base_may_have_several_names() -> None:
    assert served_names("base") == ("base", ())
    assert served_names("base, gpt-4o,chat") == ("base", ("gpt-4o", "chat"))
    for wrong in ("", "a,,b", "a,a"):
        with pytest.raises(StartupError, match="served-name"):
            served_names(wrong)
