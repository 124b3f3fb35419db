"""The files in deploy/ against a real Prometheus that scrapes a real server under load."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from monitoring import DEPLOY, MISSING, PROMETHEUS, PROMTOOL, Prometheus, alerts, panels, prometheus
from running_server import RunningServer, free_port, running_server
from safetensors.torch import save_file

from support.tiny_base import make_base, make_tokenizer

pytestmark = pytest.mark.skipif(PROMETHEUS is None or PROMTOOL is None, reason=MISSING)
PATIENCE_SECONDS = 45
SETTINGS = (
    *("--served-name", "tiny", "--quantize", "none", "--max-context", "256", "--threads", "1", "--max-slots", "1"),
    *("--max-rows", "2", "--adapter-labels", "10"),
)


PROMPT = "a prompt that begins like all the others, so that its pages are found"


@dataclass(frozen=True)
class Monitored:
    """traces: what a collector was sent."""

    server: RunningServer
    prometheus: Prometheus
    traces: list[bytes]


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An OpenTelemetry collector that keeps what comes: its address, and that."""
    came: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}/v1/traces", came
        made.shutdown()


def write_adapter(folder: Path, seed: int) -> None:
    """A LoRA of rank 4 on both layers' q_proj of the tiny base."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "tiny"}))
    tensors = {}
    for layer in range(2):
        at = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{at}.lora_A.weight"] = torch.randn(4, 64) * 0.1
        tensors[f"{at}.lora_B.weight"] = torch.randn(64, 4) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")


def train(http: str) -> None:
    """A job that is still running when the test is over."""
    rows = "\n".join(json.dumps({"prompt": f"{i} ->", "completion": f" {i + 1}"}) for i in range(160))
    files = {"file": ("rows.jsonl", rows.encode())}
    file = httpx.post(f"{http}/v1/files", files=files, data={"purpose": "fine-tune"}).raise_for_status().json()
    options = {"n_epochs": 1000, "batch_size": 8, "learning_rate": 0.001, "r": 4, "quantize": "none"}
    job = {"model": "tiny", "training_file": file["id"], "suffix": "counting", "hyperparameters": options}
    httpx.post(f"{http}/v1/fine_tuning/jobs", json=job).raise_for_status()


def ask(http: str, model: str, prompt: str) -> None:
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": 12, "ignore_eos": True}
    httpx.post(f"{http}/v1/completions", json=body, timeout=30)


def load(http: str, stopped: threading.Event) -> None:
    """Adapters that take turns in one slot, a long prompt with a beginning of its own, and a name that is not there."""
    turn = 0
    while not stopped.is_set():
        turn += 1
        for model in ("tiny", "north", "south", "nobody"):
            ask(http, model, f"{PROMPT} {turn}")


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    folder = tmp_path_factory.mktemp("monitored")
    base = make_base(folder / "tiny", make_tokenizer())
    for seed, name in enumerate(("north", "south")):
        write_adapter(folder / "adapters" / name, seed)
    stopped = threading.Event()
    with ExitStack() as stack:
        address, traces = stack.enter_context(collector())
        folders = ("--base", str(base), "--adapters", str(folder / "adapters"))
        watched = ("--log-format", "json", "--otlp-endpoint", address)
        server = stack.enter_context(running_server(folder, *folders, *watched, *SETTINGS))
        train(server.http)
        clients = [threading.Thread(target=load, args=(server.http, stopped)) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            with prometheus(folder, free_port(), server.http.removeprefix("http://")) as made:
                yield Monitored(server, made, traces)
        finally:
            stopped.set()
            for client in clients:
                client.join()


def test_every_panel_and_every_alert_has_an_answer(monitored: Monitored) -> None:
    """Nothing asks for a name, a label or a phase that does not come."""
    limit = time.monotonic() + PATIENCE_SECONDS
    silent = [*panels(), *alerts()]
    assert len(silent) > 50
    while silent and time.monotonic() < limit:
        time.sleep(1)
        silent = [one for one in silent if not monitored.prometheus.ask(one.text)]
    assert not silent, "\n".join(f"{one.where} has no answer to {one.text}" for one in silent)


def test_no_alert_has_an_error(monitored: Monitored) -> None:
    groups = httpx.get(f"{monitored.prometheus.url}/api/v1/rules").json()["data"]["groups"]
    told = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert len(told) == len(alerts()) and not any(rule.get("lastError") for rule in told.values())
    assert told["AdaplexDown"]["state"] == "inactive"


def test_every_panel_draws_a_metric_of_this_server(monitored: Monitored) -> None:
    """And whatever begins with adaplex_ in the files is told by a server, not only answered by chance."""
    body = httpx.get(f"{monitored.server.http}/metrics").text
    families = set(re.findall(r"^# TYPE (\S+)", body, re.M))
    for one in (*panels(), *alerts()):
        for name in re.findall(r"\badaplex_[a-z_]+", one.text):
            assert name in families or re.sub("_(bucket|sum|count)$", "", name) in families, (one.where, name)


def test_promtool_finds_nothing_wrong_with_a_scrape(monitored: Monitored) -> None:
    """But for vLLM's names, which are what they are."""
    assert PROMTOOL is not None
    body = httpx.get(f"{monitored.server.http}/metrics").content
    checked = subprocess.run([PROMTOOL, "check", "metrics"], input=body, capture_output=True)
    complaints = (checked.stdout + checked.stderr).decode().splitlines()
    assert not [line for line in complaints if not line.startswith("vllm:")]


def test_lines_of_the_log_are_objects_with_trace_ids_and_no_prompts(monitored: Monitored) -> None:
    log = monitored.server.log.read_text()
    # gRPC's C library has a line of its own, in its own form.
    lines = [json.loads(line) for line in log.splitlines() if not re.match(r"[IWE]\d{4} ", line)]
    served = [line for line in lines if line.get("path") == "/v1/completions" and line["status"] == 200]
    assert served and all(re.fullmatch("[0-9a-f]{32}", line["trace_id"]) for line in served)
    assert PROMPT not in log


def test_a_collector_gets_spans_without_prompts(monitored: Monitored) -> None:
    came = b"".join(monitored.traces)
    for name in (b"generate north", b"queue", b"prefill", b"decode"):
        assert name in came
    assert PROMPT.encode() not in came


def test_every_metric_is_in_the_document(monitored: Monitored) -> None:
    told = set(re.findall(r"^# TYPE (\S+)", httpx.get(f"{monitored.server.http}/metrics").text, re.M))
    written = set(re.findall(r"^\| `(\S+)` \|", (DEPLOY.parent / "docs" / "observability.md").read_text(), re.M))
    assert told == written
