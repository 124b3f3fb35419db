"""A training job as a process of its own: `python -m adaplex_adapters.training.job FOLDER`.

FOLDER holds job.json, written before the process is started (paths are absolute, or relative to FOLDER):

    {"version": 1, "data": "train.jsonl", "validation": null, "base": {"folder": "/bases/x", "name": "x"},
     "out": "result", "options": {"method": "lora", "r": 16, ...}, "device": "auto", "memory_limit": null,
     "threads": null}

and gets what `run_folder` lists; the adapter lies in `out` once `succeeded` is the last event. The process may be
killed at any moment: started again on the same folder, it goes on from the last checkpoint. SIGTERM pauses it.

Exit codes: 0 succeeded (also when it had succeeded before), 3 paused, 1 failed (the last event says why), 2 another
process works on the folder, or job.json cannot be read: no event is written.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaplex_adapters.errors import AdaplexError, InternalError, InvalidRequest, StartupError
from adaplex_adapters.training.carry_out import TrainRequest, carry_out_in
from adaplex_adapters.training.job_terms import FAILED, JOB, PAUSED, REFUSED, RESULT, SUCCEEDED, VERSION
from adaplex_adapters.training.metrics import METRICS
from adaplex_adapters.training.option_names import options_from
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.progress import LineProgress
from adaplex_adapters.training.run_folder import RunFolder, has_succeeded, hold
from adaplex_adapters.training.stopping import stop_on_signals
from adaplex_adapters.training.trainer import Paused

_KEYS = {"version", "data", "validation", "base", "out", "options", "device", "memory_limit", "threads"}


def run_job(folder: Path) -> int:
    """Train what job.json says, and return the exit code."""
    try:
        job = read_job(folder)
        if has_succeeded(folder):
            return SUCCEEDED
        with hold(folder, resume=True) as held:
            return _run(held, folder, job)
    except AdaplexError as error:
        print(f"job: {error.message}", file=sys.stderr)
        return REFUSED


def read_job(folder: Path) -> dict[str, Any]:
    """job.json. Raises StartupError when it cannot be read as one."""
    try:
        job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"{JOB} cannot be read: {error}") from error
    if not isinstance(job, dict) or job.get("version") != VERSION or set(job) - _KEYS:
        raise StartupError(f"{JOB} must be an object of version {VERSION} with keys of {', '.join(sorted(_KEYS))}")
    return job


def request_of(folder: Path, job: dict[str, Any]) -> TrainRequest:
    """What the job asks for. Raises InvalidRequest naming the key."""
    try:
        base = job["base"]
        return TrainRequest(
            data=folder / job["data"],
            base_folder=folder / base["folder"],
            base_name=base["name"],
            out=folder / (job.get("out") or RESULT),
            work=folder,
            options=_options(job.get("options") or {}),
            validation=folder / job["validation"] if job.get("validation") else None,
            device=job.get("device") or "auto",
            memory_limit=job.get("memory_limit"),
        )
    except (KeyError, TypeError) as error:
        raise InvalidRequest(f"{JOB} lacks or misuses {error}", param="job") from error


def _options(given: Mapping[str, Any]) -> TrainOptions:
    """A job may come from another machine, so that its metrics are names of ours and never code to import."""
    options = options_from(given)
    if unknown := [name for name in options.metrics if name not in METRICS]:
        raise InvalidRequest(f"there is no metric {unknown[0][:60]!a}; use {', '.join(METRICS)}", param="metrics")
    return options


def _run(held: RunFolder, folder: Path, job: dict[str, Any]) -> int:
    steps = held.checkpoints.steps()
    held.log.write("started", pid=os.getpid(), resumed_step=steps[-1] if steps else None)
    try:
        _limit(job)
        with stop_on_signals() as stop:
            carry_out_in(held, request_of(folder, job), LineProgress(sys.stderr), stop)
    except Paused as paused:
        held.log.write("paused", step=paused.step)
        return PAUSED
    except Exception as error:  # whatever it was, the job must end with an event
        _fail(held, error)
        return FAILED
    return SUCCEEDED


def _fail(held: RunFolder, error: Exception) -> None:
    known = _known(error)
    if isinstance(known, InternalError):
        traceback.print_exception(error)
    held.log.write("failed", error=type(known).__name__, message=known.message, param=known.param)


def _known(error: Exception) -> AdaplexError:
    import torch

    if isinstance(error, AdaplexError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return InvalidRequest(
            "training ran out of memory; use a smaller batch_size with more accumulation, or gradient_checkpointing",
            param="batch_size",
        )
    return InternalError(f"training failed: {type(error).__name__}: {error}")


def _limit(job: dict[str, Any]) -> None:
    """The process's own bounds: data memory on a CPU (a GPU's is bounded by the plan), and threads."""
    import torch

    if job.get("threads"):
        torch.set_num_threads(int(job["threads"]))
    if job.get("memory_limit") and not torch.cuda.is_available():
        resource.setrlimit(resource.RLIMIT_DATA, (int(job["memory_limit"]),) * 2)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m adaplex_adapters.training.job FOLDER")
    sys.exit(run_job(Path(sys.argv[1]).resolve()))
