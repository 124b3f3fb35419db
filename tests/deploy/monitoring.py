"""A real Prometheus beside a real server, and what the files in deploy/ ask of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
MISSING = "prometheus and promtool are not installed (Debian: apt-get install prometheus)"
_COMPARISON = re.compile(r" (<|>|==|!=) (?=[0-9.e]+$)")
_VARIABLES = {"$__rate_interval": "20s", "$instance": ".*", "$adapter": ".*"}
_LONG_RANGES = re.compile(r"\[\d+[mh]\]")


@dataclass(frozen=True)
class Expression:
    """where: for whoever reads that it fails."""

    where: str
    text: str


def panels() -> list[Expression]:
    """Every query of every dashboard, with Grafana's variables filled in."""
    found = []
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                text = target["expr"]
                for name, value in _VARIABLES.items():
                    text = text.replace(name, value)
                found.append(Expression(f"{path.stem}: {panel['title']}", text))
    return found


def rules() -> list[dict[str, Any]]:
    """Every alert."""
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[Expression]:
    """What each alert compares: 0 or 1 instead of nothing or something, over the seconds that a test has."""
    found = []
    for rule in rules():
        compared, count = _COMPARISON.subn(r" \1 bool ", rule["expr"].strip())
        assert count == 1, f"{rule['alert']} does not end in one comparison with a number"
        found.append(Expression(rule["alert"], _LONG_RANGES.sub("[20s]", compared)))
    return found


@dataclass(frozen=True)
class Prometheus:
    url: str

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """The samples of now, without those that are no number."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
        return [sample for sample in answer["data"]["result"] if sample["value"][1] != "NaN"]


@contextmanager
def prometheus(folder: Path, port: int, target: str) -> Iterator[Prometheus]:
    """Scrapes `target` (HOST:PORT) twice a second by the configuration in deploy/."""
    assert PROMETHEUS is not None
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", folder)
    log = (folder / "prometheus.log").open("wb")
    line = [
        *(PROMETHEUS, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    process = subprocess.Popen(line, stdout=log, stderr=log)
    try:
        made = Prometheus(f"http://127.0.0.1:{port}")
        _wait_until_ready(made, process, folder / "prometheus.log")
        yield made
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def _wait_until_ready(made: Prometheus, process: subprocess.Popen[bytes], log: Path) -> None:
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{made.url}/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(log.read_text())
