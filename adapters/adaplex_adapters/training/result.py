"""Writing a trained adapter as a PEFT folder (adapter_config.json, adapter_model.safetensors), whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from adaplex_adapters.durable import disk_errors, sync
from adaplex_adapters.errors import Conflict
from adaplex_adapters.folder import TENSOR_FILE
from adaplex_adapters.peft_config import CONFIG_FILE


@torch.no_grad()
def round_adapter(model: Any, dtype: torch.dtype) -> None:
    """Round the trained weights to the dtype they are saved in, so that what is measured is what is saved."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.to(dtype))


@disk_errors("Saving the trained adapter")
def save_adapter(model: Any, out: Path, base_name: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the adapter of a PEFT model to `out`. A folder that has an adapter is replaced; any other is refused
    (Conflict). Raises StorageFailed when the disk refuses; what `out` held before is then still there.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / CONFIG_FILE).is_file())):
        raise Conflict(f"{out} exists and is not an adapter folder; choose another --out", param="out")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in get_peft_model_state_dict(model).items()}
        save_file(tensors, staging / TENSOR_FILE, metadata={"format": "pt"})
        config = plain_config(model.peft_config["default"], base_name)
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in (staging / TENSOR_FILE, staging / CONFIG_FILE):
            file.chmod(0o644)
            sync(file)
        staging.chmod(0o755)
        sync(staging)
        _replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def plain_config(config: Any, base_name: str) -> dict[str, Any]:
    """The settings that describe the adapter, without PEFT's other defaults and without any path of this machine."""
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": sorted(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    return fields


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
