"""Keys over real HTTP, by the fake service with a real gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaplex_server.caller import Caller, Limits
from adaplex_server.service.access.gate import Gate
from adaplex_server.service.access.key_store import KeyStore


@pytest.fixture
def keys(service: Any, tmp_path: Path) -> Any:
    store = KeyStore(tmp_path / "keys.sqlite3")
    service.gate = Gate(KeyStore(tmp_path / "keys.sqlite3"), Limits())
    yield store
    store.close()


def bearer(store: KeyStore, caller: Caller) -> dict[str, str]:
    return {"authorization": f"Bearer {store.create(caller, None)}"}


ASK = {"model": "alpha", "prompt": "x", "max_tokens": 4}


def test_without_a_key_only_health_is_told(keys: KeyStore, http: Any) -> None:
    bearer(keys, Caller(None, "somebody"))
    for path in ("/health", "/ready", "/openapi.json"):
        assert http.get(path).status_code == 200
    for answer in (http.post("/v1/completions", json=ASK), http.get("/v1/models"), http.get("/metrics")):
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"


def test_a_key_serves_its_verbs_and_models_alone(keys: KeyStore, http: Any) -> None:
    headers = bearer(keys, Caller(None, "a", frozenset({"generate"}), ("alpha",)))
    assert http.post("/v1/completions", json=ASK, headers=headers).status_code == 200
    other = http.post("/v1/completions", json={**ASK, "model": "beta"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
    assert [one["id"] for one in http.get("/v1/models", headers=headers).json()["data"]] == ["alpha"]
    denied = http.delete("/v1/adapters/alpha", headers=headers)
    assert (denied.status_code, denied.json()["error"]["code"]) == (403, "permission_denied")
    admin = bearer(keys, Caller(None, "b", frozenset({"adapters"}), ("alpha",)))
    assert http.delete("/v1/adapters/beta", headers=admin).status_code == 404
    assert http.delete("/v1/adapters/alpha", headers=admin).status_code == 200


def test_limits_are_told_in_headers(keys: KeyStore, http: Any) -> None:
    headers = bearer(keys, Caller(None, "a", limits=Limits(requests=60, tokens=6000)))
    answer = http.post("/v1/completions", json=ASK, headers=headers)
    assert answer.headers["x-ratelimit-limit-requests"] == "60"
    assert answer.headers["x-ratelimit-limit-tokens"] == "6000"


def test_a_page_of_another_site_can_make_a_browser_ask_for_nothing(http: Any) -> None:
    asked = {"content-type": "text/plain", "sec-fetch-site": "cross-site"}
    for path in ("/v1/completions", "/v1/adapters", "/v1/load_lora_adapter"):
        answer = http.post(path, content=b"{}", headers=asked)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied")
    assert http.get("/v1/models", headers=asked).status_code == 200
    assert http.post("/v1/completions", json=ASK, headers={"sec-fetch-site": "same-origin"}).status_code == 200
