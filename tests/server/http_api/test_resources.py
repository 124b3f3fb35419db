"""Models, adapters, vLLM's routes, health, metrics, and what unknown routes answer."""

from __future__ import annotations

import io
import json
import logging
import tarfile
import time
import zipfile
from typing import Any

import openai
import pytest

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"\0" * 150_000}


def _parts(files: dict[str, bytes]) -> list[tuple[str, Any]]:
    return [("files", (name, content)) for name, content in files.items()]


def test_models(client: Any) -> None:
    models = {one.id: one for one in client.models.list()}
    assert list(models)[:4] == ["org/base", "base", "alpha", "beta"]
    assert models["org/base"].parent is None
    assert models["alpha"].parent == models["alpha"].root == "org/base"
    assert models["alpha"].max_model_len == 4096
    assert models["alpha"].revision == "ab" * 32
    assert client.models.retrieve("alpha") == models["alpha"]
    assert client.models.retrieve("org/base") == models["org/base"]
    with pytest.raises(openai.NotFoundError, match="alpha, beta"):
        client.models.retrieve("nobody")


def test_a_model_can_be_deleted_like_a_fine_tuned_one(client: Any) -> None:
    assert client.models.delete("alpha").deleted
    assert "alpha" not in {one.id for one in client.models.list()}
    with pytest.raises(openai.ConflictError):
        client.models.delete("org/base")


def test_while_the_base_is_loading(http: Any, service: Any) -> None:
    service.become(state="starting", engine=None, detail="quantizing", progress=0.25)
    assert http.get("/health").status_code == 200
    answer = http.get("/ready")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json() == {"status": "unavailable", "state": "starting", "detail": "quantizing", "progress": 0.25}
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] is None
    service.become(state="failed")
    assert http.get("/health").status_code == 503
    service.become(state="ready")
    assert http.get("/ready").json()["status"] == "ok"


def test_upload_of_files(http: Any, service: Any) -> None:
    answer = http.post("/v1/adapters", data={"name": "gamma"}, files=_parts(FILES))
    assert answer.status_code == 201
    assert answer.headers["location"] == "/v1/adapters/gamma"
    told = answer.json()
    assert (told["name"], told["source"], told["state"], told["kind"], told["rank"]) == (
        "gamma",
        "upload",
        "ready",
        "lora",
        8,
    )
    assert (told["size"], told["targets"], told["revision"]) == (123, ["q_proj"], "ab" * 32)
    assert service.registry.uploaded["gamma"] == FILES
    assert http.get("/v1/adapters/gamma").json() == told
    assert told in http.get("/v1/adapters").json()["data"]
    assert http.delete("/v1/adapters/gamma").json() == {"name": "gamma", "deleted": True, "object": "adapter"}
    assert http.get("/v1/adapters/gamma").status_code == 404
    assert http.delete("/v1/adapters/gamma").status_code == 404


def test_a_composition_gets_a_name(http: Any) -> None:
    parts = [{"adapter": "alpha", "weight": 0.7}, {"adapter": "beta"}]
    answer = http.post("/v1/adapters", json={"name": "both", "compose": parts})
    assert (answer.status_code, answer.headers["location"]) == (201, "/v1/adapters/both")
    told = answer.json()
    assert (told["source"], told["virtual_tokens"]) == ("composition", 7)
    assert told["parts"] == [
        {"adapter": "alpha", "weight": 0.7, "revision": "ab" * 32},
        {"adapter": "beta", "weight": 1.0, "revision": "ab" * 32},
    ]
    assert http.get("/v1/adapters/both").json() == told
    assert http.get("/v1/adapters/alpha").json()["parts"] == []


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"name": "both", "compose": []}, 400, "compose"),
        ({"name": "both", "compose": [{"adapter": "alpha"}] * 9}, 400, "compose"),
        ({"name": "a+b", "compose": [{"adapter": "alpha"}]}, 400, "name"),
        ({"name": "both", "compose": [{"adapter": "nobody"}]}, 404, "model"),
        ({"name": "both", "compose": [{"adapter": "alpha", "weight": "1"}]}, 400, "compose[0].weight"),
        ({"name": "both", "compose": [{"adapter": "alpha", "wieght": 1}]}, 400, "compose[0].wieght"),
    ],
)
def test_a_composition_that_is_refused(body: dict[str, Any], status: int, param: str, http: Any) -> None:
    answer = http.post("/v1/adapters", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    return out.getvalue()


def _tar(mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in FILES.items():
            entry = tarfile.TarInfo(f"folder/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.parametrize(("name", "content"), [("a.zip", _zip()), ("a.tar", _tar("w")), ("a.tar.gz", _tar("w:gz"))])
def test_upload_of_an_archive(http: Any, service: Any, name: str, content: bytes) -> None:
    answer = http.post("/v1/adapters", data={"name": "gamma"}, files=_parts({name: content}))
    assert answer.status_code == 201, answer.text
    assert service.registry.uploaded["gamma"] == FILES


def _bomb() -> bytes:
    """A few hundred bytes that would expand to more than the server takes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_config.json", b"{}")
        archive.writestr("adapter_model.safetensors", b"\0" * 600_000)
    return out.getvalue()


BAD_UPLOADS: dict[str, tuple[dict[str, str], list[tuple[str, Any]], int, str]] = {
    "no name": ({}, _parts(FILES), 400, "'name' is missing"),
    "no files": ({"name": "x"}, [], 400, "multipart/form-data"),
    "only a text": ({"name": "x"}, [("name", (None, "y"))], 400, "twice"),
    "wrong field": ({"name": "x"}, [("file", ("a.json", b""))], 400, "Unknown part 'file'"),
    "unknown text": ({"name": "x", "rank": "8"}, _parts(FILES), 400, "Unknown part 'rank'"),
    "bad name": ({"name": "../x"}, _parts(FILES), 400, "cannot name an adapter"),
    "long name": ({"name": "x" * 2000}, _parts(FILES), 400, "longer than"),
    "path": ({"name": "x"}, _parts({"../../etc/passwd": b""}), 400, "plain names"),
    "absolute": ({"name": "x"}, _parts({"/etc/passwd": b""}), 400, "plain names"),
    "hidden": ({"name": "x"}, _parts({".bashrc": b""}), 400, "plain names"),
    "case": ({"name": "x"}, _parts({"a.json": b"", "A.JSON": b""}), 400, "twice"),
    "too many": ({"name": "x"}, _parts({f"f{i}": b"" for i in range(65)}), 413, "at most 64"),
    "too large": ({"name": "x"}, _parts({"a": b"x" * 600_000}), 413, "larger than 500000"),
    "bomb": ({"name": "x"}, _parts({"a.zip": _bomb()}), 413, "more than 500000 bytes"),
    "broken archive": ({"name": "x"}, _parts({"a.zip": b"PK nothing"}), 400, ""),
}


@pytest.mark.parametrize("case", BAD_UPLOADS)
def test_bad_uploads(http: Any, service: Any, case: str) -> None:
    data, files, status, words = BAD_UPLOADS[case]
    answer = http.post("/v1/adapters", data=data, files=files)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
    assert service.registry.uploaded == {}


@pytest.mark.parametrize("cut", [10, 100, 150_200, -20])
def test_an_upload_that_ends_in_the_middle(http: Any, service: Any, cut: int) -> None:
    whole = http.build_request("POST", "/v1/adapters", data={"name": "gamma"}, files=_parts(FILES))
    body = whole.read()[:cut]
    answer = http.post("/v1/adapters", content=body, headers={"content-type": whole.headers["content-type"]})
    assert answer.status_code == 400
    assert service.registry.uploaded == {}


def test_names_in_paths(http: Any) -> None:
    for name in ("a/b", "..%2f..%2fetc", "%00", "x" * 5000, "%ff", "%C3%A4"):
        assert http.get(f"/v1/adapters/{name}").status_code == 404
        assert http.get(f"/v1/models/{name}").status_code == 404


def test_vllms_adapter_routes(http: Any, service: Any) -> None:
    body = {"lora_name": "delta", "lora_path": "inside/delta"}
    answer = http.post("/v1/load_lora_adapter", json=body)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'delta' added successfully.")
    assert http.post("/v1/load_lora_adapter", json=body).status_code == 400
    assert http.post("/v1/load_lora_adapter", json={**body, "load_inplace": True}).status_code == 200
    outside = http.post("/v1/load_lora_adapter", json={"lora_name": "e", "lora_path": "/etc"})
    assert (outside.status_code, outside.json()["error"]["param"]) == (400, "lora_path")
    wrong = http.post("/v1/load_lora_adapter", json={**body, "load_inplace": True, "base_model_name": "other"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "base_model_name")
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "delta"}).status_code == 200
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "delta"}).status_code == 404
    assert "delta" not in service.registry.adapters


def test_metrics_and_version(http: Any) -> None:
    answer = http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.text == "adaplex_up 1\n" and answer.headers["content-encoding"] == "gzip"
    plain = http.get("/metrics", headers={"accept-encoding": "identity"})
    assert plain.text == "adaplex_up 1\n" and "content-encoding" not in plain.headers
    assert http.get("/version").json()["version"]


def test_unknown_routes_and_methods(http: Any) -> None:
    for method, path, status in (
        ("GET", "/v1", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/adapters", 405),
        ("GET", "/v1/models/", 404),
    ):
        answer = http.request(method, path)
        assert answer.status_code == status, (method, path)
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.headers["x-request-id"]
    assert set(http.put("/v1/adapters").headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}


def test_request_ids(http: Any, service: Any) -> None:
    sane = http.get("/health", headers={"x-request-id": "my-id_1.2:3"})
    assert sane.headers["x-request-id"] == "my-id_1.2:3"
    for bad in ("a b", "x" * 200, '"', "{}"):
        assert http.get("/health", headers={"x-request-id": bad}).headers["x-request-id"].startswith("req_")
    http.post("/v1/completions", json={"model": "alpha", "prompt": "x"}, headers={"x-request-id": "mine"})
    assert service.asked[-1].request_id == "mine"


def _access_lines(caplog: Any) -> list[dict[str, Any]]:
    return [json.loads(one.getMessage()) for one in caplog.records if one.name == "adaplex.access"]


def test_the_access_log_is_one_json_line_without_prompts(http: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, logger="adaplex.access"):
        http.post("/v1/completions?key=secret", json={"model": "alpha", "prompt": "secret"})
        http.get("/a%0ab")
        http.post("/v1/completions", json={"model": "breaks-late", "prompt": "secret", "stream": True})
        deadline = time.monotonic() + 10  # a line is written once the last byte has gone, so the client may be first
        while len(lines := _access_lines(caplog)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [(one["method"], one["path"], one["status"]) for one in lines] == [
        ("POST", "/v1/completions", 200),
        ("GET", "/a\nb", 404),
        ("POST", "/v1/completions", 200),
    ]
    assert [one["outcome"] for one in lines] == [None, "not_found", "row_failed"]
    assert lines[0]["model"] == "alpha"
    assert not any("secret" in one.getMessage() or "\n" in one.getMessage() for one in caplog.records)
