"""Settings: every source, their order, and refusals that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaplex_adapters.errors import StartupError
from adaplex_server.settings import ServerSettings, host_and_port, load_settings, weights


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "adaplex.toml"
    file.write_text("max_rows = 3\nmax_waiting = 4\nmax_rank = 5\n")
    environ = {"ADAPLEX_MAX_WAITING": "40", "ADAPLEX_MAX_RANK": "50", "ADAPLEX_CONFIG": str(file)}
    settings = load_settings(None, environ, {"max_rank": "500"})
    assert (settings.max_rows, settings.max_waiting, settings.max_rank) == (3, 40, 500)


def test_sizes_are_read_with_their_units() -> None:
    assert load_settings(None, {}, {"kv_memory": "1.5GiB"}).kv_memory == 3 << 29


@pytest.mark.parametrize(
    "text",
    [
        "max_rows = 'many'",
        "max_rows = 0",
        "device = 'tpu'",
        "kv_memory = 'lots'",
        "quantize = 'int4'",
        "quant_block = 100",
        "int8_threshold = -1",
        "adapter_weights = 'a'",
        "adapter_weights = 'a=0'",
        "adapter_weights = 'a=1,a=2'",
        "adapter_weights = 'a=-1'",
        "adapter_weights = 'a=inf'",
    ],
)
def test_a_bad_value_in_the_file_is_refused_with_its_key(tmp_path: Path, text: str) -> None:
    file = tmp_path / "adaplex.toml"
    file.write_text(text)
    with pytest.raises(StartupError, match=f"'{text.split()[0]}' from the configuration file"):
        load_settings(file, {}, {})


def test_weights_are_pairs() -> None:
    assert weights("") == {} and weights("a=2, team/b=0.5") == {"a": 2.0, "team/b": 0.5}


def test_unknown_keys_are_refused_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "adaplex.toml"
    file.write_text("max_row = 3")
    with pytest.raises(StartupError, match="'max_row' in the configuration file"):
        load_settings(file, {}, {})
    with pytest.raises(StartupError, match="'max_row' in the environment"):
        load_settings(None, {"ADAPLEX_MAX_ROW": "3"}, {})


def test_a_file_that_is_missing_or_broken_is_told(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot be read"):
        load_settings(tmp_path / "none.toml", {}, {})
    (tmp_path / "bad.toml").write_text("= 3")
    with pytest.raises(StartupError, match="not valid TOML"):
        load_settings(tmp_path / "bad.toml", {}, {})


def test_defaults_need_nothing() -> None:
    assert load_settings(None, {}, {}) == ServerSettings()


@pytest.mark.parametrize(
    ("address", "parts"), [("127.0.0.1:80", ("127.0.0.1", 80)), (":0", ("127.0.0.1", 0)), ("[::1]:5", ("::1", 5))]
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert host_and_port(address, "http") == parts


@pytest.mark.parametrize("address", ["localhost", "a:b", "a:70000", ""])
def test_a_bad_address_names_its_setting(address: str) -> None:
    with pytest.raises(StartupError, match="'grpc'"):
        host_and_port(address, "grpc")


def test_variables_of_other_commands_and_of_kubernetes_are_no_settings() -> None:
    others = (
        "ADAPLEX_SERVER",
        "ADAPLEX_SERVICE_HOST",
        "ADAPLEX_SERVICE_PORT_HTTP",
        "ADAPLEX_PORT",
        "ADAPLEX_PORT_80_TCP",
    )
    assert load_settings(None, dict.fromkeys(others, "tcp://10.0.0.1:80"), {}) == load_settings(None, {}, {})
