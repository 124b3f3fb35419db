"""A GPTQ checkpoint as a transformers model whose quantized linears are `GptqLinear`s: no other library is needed.

The model is built without memory for its weights; each tensor of the files goes straight to the device.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from adaplex_adapters.errors import StartupError
from adaplex_adapters.training.gptq_linear import GptqLinear, gptq_tensors


def load_gptq_model(folder: Path, quantization: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """The causal LM of a folder in Hugging Face layout. Raises StartupError naming what is missing."""
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = dict(_tensors(folder, device))
    for path, module in list(model.named_modules()):
        if f"{path}.qweight" in state:
            if not isinstance(module, torch.nn.Linear):
                raise StartupError(f"{path} is quantized by GPTQ, but is a {type(module).__name__}, not a linear")
            bias = state.pop(f"{path}.bias").to(dtype) if module.bias is not None else None
            model.set_submodule(path, GptqLinear(gptq_tensors(state, path, quantization), bias, dtype))
    _assign(model, state, dtype)
    model.tie_weights()
    missing = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if missing:
        raise StartupError(f"{folder.name} lacks the tensor {missing[0]} ({len(missing)} are missing)")
    model.generation_config = _generation(folder, model)
    return model.to(device).eval()


def _assign(model: Any, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in state.items():
        if name in parameters:
            if parameters[name].shape != tensor.shape:
                raise StartupError(f"{name} has the shape {list(tensor.shape)}, not {list(parameters[name].shape)}")
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor.to(dtype), requires_grad=False))


def _tensors(folder: Path, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for name in sorted(names):
        if not (folder / name).is_file():
            raise StartupError(f"{folder.name} lacks {name}")
        with safe_open(folder / name, framework="pt", device=str(device)) as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                yield key, file.get_tensor(key)


def _generation(folder: Path, model: Any) -> Any:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.generation_config
