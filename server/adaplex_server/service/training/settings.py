"""What training as a service is built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaplex_server.service.training.job_options import check_options
from adaplex_server.service.training.trainer_process import COMMAND


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """folder: of files and jobs. base: the checkpoint that is served, and its name. memory: bytes of the trainer at
    most, None for what is free. threads: of the trainer on a CPU. attempts: starts of a process that crashes, before
    its job fails. max_file_bytes: of an uploaded file. check_options: raises InvalidRequest for what no job may be
    given.
    """

    folder: Path
    base: Path
    base_name: str
    device: str = "auto"
    memory: int | None = None
    threads: int | None = None
    attempts: int = 3
    retry_seconds: float = 5.0
    max_file_bytes: int = 512 << 20
    command: tuple[str, ...] = COMMAND
    check_options: Callable[[Mapping[str, Any]], None] = check_options
