"""The Ray Serve application, with two replicas on this machine: affinity, streaming, hang-ups, adapters that appear."""

from __future__ import annotations

import importlib
import json
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import torch
import yaml

pytest.importorskip("ray")

import ray
from ray import serve

from adaplex_adapters.errors import StartupError
from adaplex_loadtest.random_adapters import write_random_lora
from adaplex_server.model.config import read_config
from adaplex_server.model.families import base_shape
from adaplex_server.ray_serve.application import REPLICA_NAME, application, build_app
from adaplex_server.ray_serve.shape import RayShape
from adaplex_server.settings import ServerSettings
from support.tiny_base import make_base, make_tokenizer

pytestmark = pytest.mark.timeout(240)
ROOT = Path(__file__).parents[2]
NAMES = ("one", "two", "three")


@dataclass(frozen=True)
class App:
    client: httpx.Client
    adapters: Path
    base: Path

    def ask(self, model: str, **more: object) -> httpx.Response:
        body = {"model": model, "prompt": "abc", "max_tokens": 8, "temperature": 0, "return_token_ids": True, **more}
        return self.client.post("/v1/completions", json=body)

    def tokens(self, model: str) -> list[int]:
        answer = self.ask(model)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    def running(self) -> dict[str, int]:
        """Rows under way in each of the two replicas. Several are asked at once, or the busier one never would be."""
        seen: dict[str, int] = {}
        limit = time.monotonic() + 20
        with ThreadPoolExecutor(8) as pool:
            while len(seen) < 2 and time.monotonic() < limit:
                for answer in pool.map(self.client.get, ["/v1/adapters"] * 8):
                    seen[answer.headers["x-adaplex-replica"]] = sum(one["running"] for one in answer.json()["data"])
        return seen


def write_adapter(folder: Path, base: Path, seed: int) -> Path:
    shape = base_shape(read_config(base, "tiny"))
    return write_random_lora(folder, shape, rank=4, seed=seed, scale=0.5, dtype=torch.float32)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    folder = tmp_path_factory.mktemp("ray")
    base = make_base(folder / "tiny", make_tokenizer())
    config = json.loads((base / "config.json").read_text())
    # Room for an answer that nobody could wait for.
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 30000}))
    adapters = folder / "adapters"
    for seed, name in enumerate(NAMES):
        write_adapter(adapters / name, base, seed)
    settings = ServerSettings(
        base=str(base), adapters=adapters, data_dir=folder / "data", quantize="none", device="cpu", threads=1,
        dtype="float32", max_rows=4, kv_memory="16MiB", adapter_memory="16MiB",
    )  # fmt: skip
    port = free_port()
    environment = {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": path} if (path := os.environ.get("PYTHONPATH")) else {})
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": environment})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_app(settings, RayShape(replicas=2, cpus=0.1, gateway_cpus=0.1)), route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield App(client, adapters, base)
    finally:
        serve.shutdown()
        ray.shutdown()


def test_the_example_is_an_application() -> None:
    (example,) = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())["applications"]
    module, _, name = example["import_path"].partition(":")
    assert isinstance(getattr(importlib.import_module(module), name)(example["args"]), serve.Application)


def test_words_of_a_command_line_become_an_application_and_wrong_ones_are_refused() -> None:
    assert isinstance(application({"base": "x", "max_rows": "8", "replicas": "2"}), serve.Application)
    for wrong in ({"bases": "x"}, {"replicas": "none"}, {"tls_cert": "a", "tls_key": "b"}):
        with pytest.raises(StartupError):
            application(wrong)


def test_each_name_has_an_answer_of_its_own_and_keeps_its_replica(app: App) -> None:
    alone = {"tiny": app.tokens("tiny")}
    for name in NAMES:
        alone[name] = app.tokens(name)
        time.sleep(2)  # until Ray's router has heard who holds it
    assert len({tuple(tokens) for tokens in alone.values()}) == 4
    holders = {name: {app.ask(name).headers["x-adaplex-replica"] for _ in range(8)} for name in NAMES}
    assert all(len(replicas) == 1 for replicas in holders.values()), holders
    assert len(set.union(*holders.values())) == 2
    assert {app.ask("tiny").headers["x-adaplex-replica"] for _ in range(20)} == set.union(*holders.values())
    assert {name: app.tokens(name) for name in alone} == alone


def test_concurrent_requests_are_answered_as_if_alone(app: App) -> None:
    names = ("tiny", *NAMES) * 5
    alone = {name: app.tokens(name) for name in set(names)}
    with ThreadPoolExecutor(len(names)) as threads:
        assert list(threads.map(app.tokens, names)) == [alone[name] for name in names]


def test_an_answer_streams(app: App) -> None:
    body = {"model": "two", "prompt": "abc", "max_tokens": 64, "temperature": 0, "ignore_eos": True, "stream": True}
    with app.client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        pieces = list(answer.iter_raw())
    events = b"".join(pieces).decode().split("\n\n")
    assert len(pieces) > 10
    assert events[-2] == "data: [DONE]"
    texts = [json.loads(one.removeprefix("data: "))["choices"][0]["text"] for one in events[:-2] if "text" in one]
    whole = app.ask("two", max_tokens=64, ignore_eos=True).json()["choices"][0]["text"]
    assert "".join(texts) == whole


def test_a_client_that_leaves_ends_its_row(app: App) -> None:
    body = {"model": "one", "prompt": "abc", "max_tokens": 29000, "ignore_eos": True, "stream": True}
    with app.client.stream("POST", "/v1/completions", json=body) as answer:
        pieces = answer.iter_raw()  # kept, as httpx closes the connection with it
        assert b"text" in next(pieces)
        assert sum(app.running().values()) == 1
    limit = time.monotonic() + 5
    while sum(app.running().values()):
        assert time.monotonic() < limit, "the row is still running"


def test_a_folder_that_appears_or_changes_is_served(app: App) -> None:
    assert app.ask("four").status_code == 404
    write_adapter(app.adapters / "four", app.base, 11)
    first = app.tokens("four")
    write_adapter(app.adapters / "four", app.base, 12)
    assert app.tokens("four") != first


def test_what_would_change_one_replica_alone_is_refused(app: App) -> None:
    refused = app.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "y"})
    assert refused.status_code == 400
    assert "adapter folder" in refused.json()["error"]["message"]
    assert app.client.get("/nowhere").status_code == 404


def test_errors_are_those_of_a_replica(app: App) -> None:
    assert app.ask("../one").json()["error"]["code"] == "model_not_found"
    assert app.client.post("/v1/completions", content=b"{").json()["error"]["code"] == "invalid_value"
    assert app.client.get("/ready").json()["status"] == "ok"


def test_a_replica_that_dies_is_replaced_and_others_go_on(app: App) -> None:
    alone = {name: app.tokens(name) for name in ("tiny", *NAMES)}
    before = set(app.running())
    processes = psutil.Process().children(recursive=True)
    victim = next(one for one in processes if one.name().startswith("ray::") and REPLICA_NAME in one.cmdline()[0])
    victim.kill()
    limit = time.monotonic() + 60
    while True:  # requests under way at the dead one are lost; later ones are not
        answers = {name: app.ask(name) for name in alone}
        if all(answer.status_code == 200 for answer in answers.values()):
            break
        assert time.monotonic() < limit, {name: answer.text for name, answer in answers.items()}
    assert {name: answer.json()["choices"][0]["token_ids"] for name, answer in answers.items()} == alone
    while len(before | set(app.running())) < 3:
        assert time.monotonic() < limit, "no replica took the dead one's place"
        time.sleep(1)
