"""bitsandbytes' 4-bit models with their exact values in float32: what a merge must be equal to."""

from __future__ import annotations

from typing import Any

import torch


def in_float32(model: Any) -> Any:
    """The same model, changed: each 4-bit linear becomes a dense one with its dequantized weight."""
    import bitsandbytes

    for path, layer in list(model.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            state = layer.weight.quant_state
            state.dtype = torch.float32
            dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            dense.weight.data = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
            model.set_submodule(path, dense)
    return torch.nn.Module.float(model).eval()
