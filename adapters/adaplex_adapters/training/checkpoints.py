"""Checkpoints on disk: everything that the next step depends on, whole or not at all, never a pickle.

    checkpoints/step-00000120/state.safetensors   weights (float32), the best ones so far, optimizer, random state
    checkpoints/step-00000120/state.json          the rest, with a digest of what the run is

A run that goes on from one gives the same losses, bit for bit, as one that was never stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaplex_adapters.durable import disk_errors, sync, write_file
from adaplex_adapters.errors import Conflict, StorageFailed
from adaplex_adapters.training.loop import CourseState

VERSION = 1
TENSORS, PLAIN = "state.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """weights: of the adapter, by name; best: those of the best measurement, where it is not this step's. kept:
    whatever the trainer needs, as JSON has it. run: digest of the run's settings; another run's is refused.
    """

    run: str
    course: CourseState
    weights: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    kept: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates done."""
        return self.course.step


class Checkpoints:
    """The checkpoints of one run, in a folder that nobody else writes to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, in order."""
        if not self._folder.is_dir():
            return []
        return sorted(int(p.name.removeprefix("step-")) for p in self._folder.glob("step-*") if (p / PLAIN).is_file())

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self._folder / f"step-{step:08d}"

    @disk_errors("Writing a checkpoint")
    def write(self, checkpoint: Checkpoint, limit: int, best_step: int | None, only_model: bool) -> Path:
        """Returns when the checkpoint is on the disk. Then keeps it, the `limit` newest and the best one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        final = self.path(checkpoint.step)
        for left in self._folder.glob(".writing-*"):  # of a process that was killed
            shutil.rmtree(left)
        staging = self._folder / f".writing-{os.getpid()}"
        staging.mkdir()
        _write(staging, checkpoint)
        if final.exists():
            shutil.rmtree(final)
        staging.rename(final)
        sync(self._folder)
        kept = self.steps()[-limit:]
        for step in self.steps():
            if step not in (*kept, best_step):
                shutil.rmtree(self.path(step))
            elif only_model and step != checkpoint.step:
                _drop_course(self.path(step))
        return final

    def latest(self, run: str) -> Checkpoint | None:
        """The newest checkpoint, None where there is none. Raises Conflict when it is another run's, StorageFailed
        when it cannot be read.
        """
        found = self.steps()
        if not found:
            return None
        checkpoint = _read(self.path(found[-1]))
        if checkpoint.run != run:
            raise Conflict(
                "the checkpoints here are of a run with other data, options or base; remove them or use another folder",
                param="resume",
            )
        return checkpoint

    def clear(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    from safetensors.torch import save

    tensors = {f"weights.{k}": v for k, v in checkpoint.weights.items()}
    tensors |= {f"best.{k}": v for k, v in checkpoint.best.items()}
    tensors |= {f"course.{k}": v for k, v in checkpoint.course.tensors.items()}
    plain = {
        "version": VERSION,
        "run": checkpoint.run,
        "step": checkpoint.step,
        "numbers": checkpoint.course.numbers,
        "kept": checkpoint.kept,
    }
    write_file(folder / TENSORS, [save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})])
    write_file(folder / PLAIN, [json.dumps(plain).encode()])
    sync(folder)


def _read(folder: Path) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / TENSORS)
        plain = json.loads((folder / PLAIN).read_text(encoding="utf-8"))
        if plain["version"] != VERSION:
            raise ValueError(f"it has version {plain['version']}, this program writes {VERSION}")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise StorageFailed(
            f"the checkpoint {folder.name} cannot be read: {error}; remove it to go on before it"
        ) from error

    def under(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    course = CourseState(plain["step"], under("course."), plain["numbers"])
    return Checkpoint(plain["run"], course, under("weights."), under("best."), plain["kept"])


def _drop_course(folder: Path) -> None:
    """Leave the adapter's weights alone in an older checkpoint, which then cannot be resumed from."""
    from safetensors.torch import load_file, save_file

    state = folder / TENSORS
    weights = {k: v for k, v in load_file(state).items() if k.startswith("weights.")}
    smaller = folder / f".{TENSORS}"
    save_file(weights, smaller)
    smaller.replace(state)
