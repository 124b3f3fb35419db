"""Keys in a real file, and what the gate makes of them."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaplex_adapters.errors import AuthenticationFailed, ModelNotFound, PermissionDenied, RateLimited, StartupError
from adaplex_server.caller import ANYONE, Caller, Limits
from adaplex_server.service.access import key_store
from adaplex_server.service.access.gate import Gate
from adaplex_server.service.access.key_store import KeyStore


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyStore]:
    monkeypatch.setattr(key_store, "_PATIENCE", 0.0)
    made = KeyStore(tmp_path / "keys.sqlite3")
    yield made
    made.close()


def test_a_server_without_keys_lets_anyone_in(store: KeyStore) -> None:
    assert Gate(store, Limits()).caller(None) is ANYONE


def test_one_key_closes_the_door_for_everybody_else(store: KeyStore) -> None:
    gate = Gate(store, Limits())
    key = store.create(Caller(None, "team", frozenset({"generate"})), None)
    assert gate.caller(f"Bearer {key}").name == "team"
    for wrong in (None, "", key, "Bearer", "Bearer x", f"Bearer {key}x", f"Basic {key}", f"Bearer {key[:-1]}A"):
        if wrong != f"Bearer {key}":
            with pytest.raises(AuthenticationFailed):
                gate.caller(wrong)


def test_secrets_are_nowhere_in_the_file(store: KeyStore, tmp_path: Path) -> None:
    secret = store.create(ANYONE, None).split("_", 2)[2].encode()
    assert not [file for file in tmp_path.iterdir() if secret in file.read_bytes()]


def test_a_running_server_sees_new_and_revoked_keys(store: KeyStore, tmp_path: Path) -> None:
    elsewhere = KeyStore(tmp_path / "keys.sqlite3")
    gate = Gate(store, Limits())
    assert gate.caller(None) is ANYONE
    key = elsewhere.create(Caller(None, "late"), None)
    caller = gate.caller(f"bearer {key}")
    elsewhere.revoke(str(caller.key))
    with pytest.raises(AuthenticationFailed, match="revoked"):
        gate.caller(f"Bearer {key}")
    with pytest.raises(AuthenticationFailed):  # revoking the last key does not open the door
        gate.caller(None)


def test_keys_expire(store: KeyStore) -> None:
    key = store.create(ANYONE, time.time() - 1)
    with pytest.raises(AuthenticationFailed, match="expired"):
        Gate(store, Limits()).caller(f"Bearer {key}")


def test_verbs_and_unknown_routes_are_denied(store: KeyStore) -> None:
    gate = Gate(store, Limits())
    key = f"Bearer {store.create(Caller(None, 'reader', frozenset({'generate'})), None)}"
    assert gate.allow("POST /v1/completions", key).name == "reader"
    for route in ("POST /v1/adapters", "GET /metrics", "/adaplex.v1.Adapters/Load", "GET /not/in/the/table"):
        with pytest.raises(PermissionDenied):
            gate.allow(route, key)
    assert gate.allow("GET /health", None) is ANYONE


def test_scope_hides_other_names(store: KeyStore) -> None:
    caller = Caller("k", "a", models=("team-a-*", "base"))
    Gate.check_name(caller, "team-a-dates")
    with pytest.raises(ModelNotFound):
        Gate.check_name(caller, "team-b-dates")


def test_limits_of_key_and_adapter_hold_together(store: KeyStore) -> None:
    gate = Gate(store, Limits(streams=2))
    one, two = Caller("1", "one", limits=Limits(streams=1)), Caller("2", "two")
    first = gate.admit(one, ("a",), 5)
    with pytest.raises(RateLimited, match="API key 1"):
        gate.admit(one, ("b",), 5)
    gate.admit(two, ("a",), 5)
    with pytest.raises(RateLimited, match="adapter 'a'"):
        gate.admit(two, ("a",), 5)
    gate.admit(two, (), 5)
    first.release()
    gate.admit(one, ("a",), 5)


def test_a_foreign_or_damaged_file_is_refused_and_kept(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.sqlite3"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE t (x)")
    damaged = tmp_path / "damaged.sqlite3"
    damaged.write_bytes(b"not a database at all" * 100)
    for file in (foreign, damaged):
        before = file.read_bytes()
        with pytest.raises(StartupError):
            KeyStore(file)
        assert file.read_bytes() == before
