"""Folders in the layout of the `adapters` library, written by hand: that library needs an older transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file

# The fields in which the library's named configs differ from one another.
NAMED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "seq_bn": {"original_ln_before": True, "mh_adapter": False, "output_adapter": True, "non_linearity": "relu"},
        "double_seq_bn": {"mh_adapter": True, "output_adapter": True, "non_linearity": "swish"},
        "par_bn": {
            "mh_adapter": False,
            "output_adapter": True,
            "is_parallel": True,
            "non_linearity": "relu",
            "scaling": 4.0,
        },
        "scaled_par_bn": {
            "mh_adapter": False,
            "output_adapter": True,
            "is_parallel": True,
            "non_linearity": "relu",
            "scaling": "learned",
        },
        "adapter_plus": {
            "original_ln_before": True,
            "original_ln_after": False,
            "residual_before_ln": False,
            "mh_adapter": False,
            "output_adapter": True,
            "non_linearity": "gelu",
            "scaling": "channel",
        },
    }
)
_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "adapter_residual_before_ln": False,
        "cross_adapter": False,
        "dropout": 0.0,
        "factorized_phm_W": True,
        "init_weights": "bert",
        "inv_adapter": None,
        "is_parallel": False,
        "leave_out": [],
        "ln_after": False,
        "ln_before": False,
        "original_ln_after": True,
        "original_ln_before": False,
        "phm_dim": 4,
        "phm_layer": False,
        "reduction_factor": 8,
        "residual_before_ln": True,
        "scaling": 1.0,
        "shared_phm_rule": True,
        "use_gating": False,
    }
)


def write_bottleneck(
    folder: Path,
    named: str = "double_seq_bn",
    layers: int = 2,
    hidden: int = 32,
    model_type: str = "llama",
    outer: Mapping[str, Any] = MappingProxyType({}),
    seed: int = 0,
    **changed: Any,
) -> Path:
    """An adapter with random weights. changed: fields of the config; outer: fields beside it."""
    config = {**_DEFAULTS, **NAMED[named], **changed}
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    factor = config["reduction_factor"]
    for layer in range(layers):
        if layer in config["leave_out"]:
            continue
        width = int(hidden // (factor.get(str(layer), factor["default"]) if isinstance(factor, dict) else factor))
        for key, place in (("mh_adapter", "attention"), ("output_adapter", "output")):
            if not config[key]:
                continue
            prefix = f"model.layers.{layer}.{place}_adapters.adapters.task."
            shapes = {
                "adapter_down.0.weight": (width, hidden),
                "adapter_down.0.bias": (width,),
                "adapter_up.weight": (hidden, width),
                "adapter_up.bias": (hidden,),
            }
            if isinstance(config["scaling"], str):
                shapes["scaling"] = (1,) if config["scaling"] == "learned" else (hidden,)
            for name, shape in shapes.items():
                tensors[prefix + name] = torch.randn(shape, generator=random) * 0.3
    folder.mkdir(parents=True)
    fields = {
        "config": config,
        "hidden_size": hidden,
        "model_class": "LlamaForCausalLM",
        "model_name": "org/base",
        "model_type": model_type,
        "name": "task",
        "version": "adapters.1.2.0",
        **outer,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter.safetensors")
    return folder
