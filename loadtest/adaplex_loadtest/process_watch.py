"""Memory, file handles and gauges of a running server, from /proc, /metrics and nvidia-smi. Linux only."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import httpx

AT_REST_NOTHING = ("adaplex_requests_running", "adaplex_requests_waiting", "adaplex_kv_pages_used")
REGISTERED = "adaplex_adapters_registered"
RESIDENT = "adaplex_adapters_resident"
_GAUGES = (
    *AT_REST_NOTHING,
    REGISTERED,
    RESIDENT,
    "adaplex_adapter_rank_rows_used",
    "adaplex_adapter_host_bytes",
    "adaplex_kv_pages_cached",
    "adaplex_engine_restarts_total",
)


@dataclass(frozen=True)
class Sample:
    """at: seconds. rss: bytes of the API process and of the engine's. handles: open files of both. gauges: by name.
    device: bytes of the GPU's memory that are taken, by whomever; 0 without one.
    """

    at: float
    rss: tuple[int, int]
    handles: tuple[int, int]
    gauges: dict[str, float]
    device: int = 0


def engine_of(server: int) -> int | None:
    """The engine's process: the child of the server that runs that module."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    for child in children:
        try:
            if b"adaplex_server.engine" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        except FileNotFoundError:  # it has just ended
            continue
    return None


def rss(process: int) -> int:
    """Bytes of memory that a process holds."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


def device_memory() -> int:
    """Bytes in use on the first GPU; 0 where there is none."""
    if shutil.which("nvidia-smi") is None:
        return 0
    command = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    return int(told) << 20 if told.isdigit() else 0


def gauges(url: str) -> dict[str, float]:
    """Figures of /metrics without labels, of those that must be flat."""
    found = {}
    for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
        name, _, value = line.partition(" ")
        if name in _GAUGES:
            found[name] = float(value)
    return found


def sample(url: str, server: int, at: float) -> Sample:
    """All of it now. Raises FileNotFoundError while there is no engine."""
    engine = engine_of(server)
    if engine is None:
        raise FileNotFoundError("the server has no engine")
    handles = [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (server, engine)]
    return Sample(at, (rss(server), rss(engine)), (handles[0], handles[1]), gauges(url), device_memory())
