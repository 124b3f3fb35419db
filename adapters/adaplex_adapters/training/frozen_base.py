"""Loading the quantized base for training and for scoring with PEFT. The weights are frozen; nobody writes to them.

On a GPU the linears stay bitsandbytes' 4-bit ones. On a CPU each is replaced by its dequantized values, kept in
memory: the gradient of QLoRA goes through exactly those values, but bitsandbytes computes them anew in each forward
and each backward pass. For SmolLM2-135M on two cores a step of 16 x 64 tokens takes 2.5-2.8 s this way and 6.0 s with
4-bit linears, for 200 MB more memory. The values are the same: a test compares them, and the logits.

bitsandbytes repacks 4-bit weights in place when an eval-mode forward runs on a CPU with AVX512-BF16, after which
gradients and dequantization are wrong. So `support_avx512bf16_for_cpu` is turned off before anything runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaplex_adapters.errors import StartupError


@dataclass(frozen=True)
class FrozenBase:
    """model: a transformers causal LM with frozen weights; tokenizer: its own. name goes into adapter_config.json."""

    model: Any
    tokenizer: Any
    name: str
    device: torch.device

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.hidden_size)


def load_frozen_base(folder: Path, name: str, device: str = "auto") -> FrozenBase:
    """The base of a folder in Hugging Face layout: NF4 as bitsandbytes saved it, or dense and then quantized here.

    Raises StartupError when the folder is not a base, when a library is missing, or for an unsupported quantization.
    """
    config = _read_config(folder)
    try:
        import bitsandbytes
        import peft  # noqa: F401 (wanted soon: better missed here, before the base is loaded)
        import transformers
    except ImportError as error:
        raise StartupError(f"training needs the extra 'train' (pip install 'adaplex[train]'): {error}") from error
    transformers.utils.logging.disable_progress_bar()
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.bfloat16, device_map={"": place}, **_quantization(config)
    )
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    if place.type == "cpu":
        keep_dequantized(model, cpu_compute_dtype())
    model.requires_grad_(False)
    model.config.use_cache = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return FrozenBase(model, tokenizer, name, place)


def cpu_compute_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively; elsewhere it would be emulated, and float32 is faster."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def keep_dequantized(model: Any, dtype: torch.dtype) -> None:
    """Replace every 4-bit linear by a dense one that holds its dequantized values [out_features, in_features]."""
    import bitsandbytes

    for path, layer in list(model.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            dense.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
            dense.bias = layer.bias
            model.set_submodule(path, dense)
    # transformers forbids changing the dtype of a quantized model; by now it is a dense one.
    torch.nn.Module.to(model, dtype)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(
            f"{folder} is not a base in Hugging Face layout: no readable config.json ({error})"
        ) from error
    if not isinstance(config, dict):
        raise StartupError(f"{folder}: config.json does not hold an object")
    return config


def _quantization(config: dict[str, Any]) -> dict[str, Any]:
    found = config.get("quantization_config")
    if found is None:
        from transformers import BitsAndBytesConfig

        wanted = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return {"quantization_config": wanted}
    if found.get("quant_method") != "bitsandbytes" or not found.get("load_in_4bit", found.get("_load_in_4bit")):
        method = found.get("quant_method")
        raise StartupError(f"training on a base quantized by {method!r} is not supported; use a dense or 4-bit one")
    return {}
