"""The README's five minutes work when pasted, command by command, against a running server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from running_server import RunningServer

ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text()
    tour = text[text.index("## Five minutes") :]
    return re.findall(r"```bash\n(.*?)```", tour[: tour.index("\n## ")], re.DOTALL)


@pytest.mark.timeout(600)
def test_the_tour_works_when_pasted(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {"ADAPLEX_DATA_DIR": str(server.data), "ADAPLEX_SERVER": server.http}
    said = []
    for command in commands():
        here = command.replace("http://127.0.0.1:8000", server.http).replace("127.0.0.1:50051", server.grpc)
        # The examples' own default addresses are those of a server started without options.
        here = here.replace("http_client.py", f"http_client.py {server.http}/v1")
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", here], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{here}\n{ran.stdout}\n{ran.stderr}"
        assert '"error"' not in ran.stdout, ran.stdout
        said.append(ran.stdout)
    everything = "\n".join(said)
    assert "$23.05" in everything, "itn-en answered over HTTP"
    assert "2026-11-21" in everything, "date-iso answered"
    assert "LIMIT 5" in everything, "tsql-postgres answered over gRPC"
    assert "shout" in {m["id"] for m in httpx.get(f"{server.http}/v1/models").json()["data"]}
    assert (tmp_path / "merged-itn-en" / "model.safetensors").exists()


def test_the_tour_has_every_part_of_it() -> None:
    tour = "\n".join(commands())
    for part in ("/v1/models", "http_client.py", "grpc_client.py", "serve-train", "adapters add", "adaplex merge"):
        assert part in tour
