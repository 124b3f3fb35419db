"""Writing a trained adapter as a folder, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from adaplex_adapters.durable import disk_errors, sync
from adaplex_adapters.errors import Conflict
from adaplex_adapters.peft_fields import CONFIG_FILE
from adaplex_adapters.training.methods.adapter import AdapterFiles


@disk_errors("Saving the trained adapter")
def save_adapter(files: AdapterFiles, out: Path, beside: Callable[[Path], None] | None = None) -> None:
    """Write the adapter's files to `out`. A folder that has an adapter is replaced; any other is refused (Conflict).
    beside: writes what else shall be in the folder, into a folder that becomes `out` a moment later.

    Raises StorageFailed when the disk refuses; what `out` held before is then still there.
    """
    from safetensors.torch import save_file

    check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        save_file(dict(files.tensors), staging / files.tensor_file, metadata={"format": "pt"})
        (staging / files.config_file).write_text(
            json.dumps(files.config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        if beside is not None:
            beside(staging)
        for file in staging.iterdir():
            file.chmod(0o644)
            sync(file)
        staging.chmod(0o755)
        sync(staging)
        _replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def clear_leftovers(out: Path) -> None:
    """Remove what killed processes left of earlier attempts to write `out`; nobody else may be writing it now."""
    for left in (*out.parent.glob(f".{out.name}.????????"), *out.parent.glob(f".{out.name}.replaced-*")):
        shutil.rmtree(left, ignore_errors=True)


def check_replaceable(out: Path) -> None:
    """Raise Conflict unless `out` is free, empty or an adapter's folder."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / CONFIG_FILE).is_file())):
        raise Conflict(f"{out} exists and is not an adapter folder; choose another --out", param="out")


def _replace(staging: Path, out: Path) -> None:
    """Put the new folder in place of an older one. Between the two renames `out` is absent, never half-written."""
    old = None
    if out.exists():
        old = out.with_name(f".{out.name}.replaced-{os.getpid()}")
        out.rename(old)
    staging.rename(out)
    sync(out.parent)
    if old is not None:
        shutil.rmtree(old)
