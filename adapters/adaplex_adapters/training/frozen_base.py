"""Loading the base for training and for scoring with PEFT: dense, NF4, FP4, int8 or GPTQ. The weights are frozen;
nobody writes to them.

On a GPU the linears stay as they are stored, and Llama-like decoders take the passes of `training.fused`. On a CPU
each quantized one is replaced by its dequantized values, kept in memory: the gradient of QLoRA goes through exactly
those values, but they would be computed anew in each forward and each backward pass. For SmolLM2-135M on two cores a
step of 16 x 64 tokens takes 2.5-2.8 s this way and 6.0 s with bitsandbytes' linears, for 200 MB more memory. The values
are the same: a test compares them, and the logits. (On a CPU bitsandbytes itself multiplies int8 weights so; on a GPU
LLM.int8 rounds the inputs too.)

bitsandbytes repacks 4-bit weights in place when an eval-mode forward runs on a CPU with AVX512-BF16, after which
gradients and dequantization are wrong. So `support_avx512bf16_for_cpu` is turned off before anything runs.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaplex_adapters.errors import StartupError
from adaplex_adapters.training.fused.decoder import fuse
from adaplex_adapters.training.fused.four_bit_linear import take_over
from adaplex_adapters.training.gptq_base import load_gptq_model
from adaplex_adapters.training.gptq_linear import GptqLinear
from adaplex_adapters.training.options import TrainOptions

FORMATS = ("none", "nf4", "fp4", "int8", "gptq")


@dataclass(frozen=True)
class FrozenBase:
    """model: a transformers causal LM with frozen weights; tokenizer: its own. name goes into adapter_config.json.

    form: "none" (dense), "nf4", "fp4", "int8" or "gptq". folder: where it was loaded from.
    """

    model: Any
    tokenizer: Any
    name: str
    device: torch.device
    form: str = "nf4"
    folder: Path | None = None

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.hidden_size)


def load_frozen_base(
    folder: Path,
    name: str,
    device: str = "auto",
    options: TrainOptions = TrainOptions(),  # noqa: B008 (frozen)
) -> FrozenBase:
    """The base of a folder in Hugging Face layout: quantized as it was saved, or dense and then kept as
    `options.quantize` says.

    Raises StartupError when the folder is not a base, when a library is missing, or for an unsupported quantization.
    """
    config = read_base_config(folder)
    form = base_form(config, options)
    try:
        import peft  # noqa: F401 (wanted soon: better missed here, before the base is loaded)
        import transformers

        if form not in ("none", "gptq"):
            import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise StartupError(f"training needs the extra 'train' (pip install 'adaplex[train]'): {error}") from error
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # one warning a product
    place = training_device(device)
    dtype = compute_dtype(options.precision, place)
    if form == "gptq":
        model = load_gptq_model(folder, config["quantization_config"], dtype, place)
    else:
        wanted = {} if config.get("quantization_config") else _quantization(form, options, dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=_loading_dtype(form, dtype), device_map={"": place}, **wanted
        )
    if place.type == "cpu" and form != "none":
        keep_dequantized(model, dtype)
    if place.type == "cuda":
        quicken(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return FrozenBase(model, load_tokenizer(folder), name, place, form, folder)


def quicken(model: Any) -> None:
    """On a GPU: four-bit linears that one kernel expands, and the decoder's own pass where its family has one. Needs
    Triton; without it the model stays as transformers and bitsandbytes made it.
    """
    if importlib.util.find_spec("triton") is not None:
        take_over(model)
        fuse(model)


def load_tokenizer(folder: Path) -> Any:
    """The base's tokenizer, with its chat template."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def training_device(device: str) -> torch.device:
    """ "auto" is the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the base multiplies in."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision != "auto":
        return named[precision]
    return torch.bfloat16 if device.type == "cuda" else cpu_compute_dtype()


def cpu_compute_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively; elsewhere it would be emulated, and float32 is faster."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def keep_dequantized(model: Any, dtype: torch.dtype) -> None:
    """Replace every quantized linear by a dense one that holds its dequantized values [out_features, in_features]."""
    for path, layer in list(model.named_modules()):
        weight = _dequantized(layer, dtype)
        if weight is None:
            continue
        dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        dense.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
        dense.bias = layer.bias
        model.set_submodule(path, dense)
    # transformers forbids changing the dtype of a quantized model; by now it is a dense one.
    torch.nn.Module.to(model, dtype)


def _dequantized(layer: Any, dtype: torch.dtype) -> torch.Tensor | None:
    """The values of a quantized linear; None for any other module."""
    if isinstance(layer, GptqLinear):
        return layer.dequantized(dtype)
    kind = type(layer.weight).__name__ if isinstance(layer, torch.nn.Linear) else ""
    if kind == "Params4bit":
        import bitsandbytes

        layer.support_avx512bf16_for_cpu = False
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    # Vector-wise absmax (LLM.int8, Dettmers et al. 2022): a scale a row, of which 127 is the largest code.
    return layer.weight.data.float() * (layer.weight.SCB.float() / 127)[:, None] if kind == "Int8Params" else None


def read_base_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. Raises StartupError when there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(
            f"{folder} is not a base in Hugging Face layout: no readable config.json ({error})"
        ) from error
    if not isinstance(config, dict):
        raise StartupError(f"{folder}: config.json does not hold an object")
    return config


def base_form(config: dict[str, Any], options: TrainOptions) -> str:
    """How the base's linears will be kept: one of FORMATS. Raises StartupError for what cannot be trained on."""
    found = config.get("quantization_config")
    if found is None:
        return "nf4" if options.quantize == "auto" else options.quantize
    form = _stored_form(found)
    if form is None:
        method = found.get("quant_method")
        raise StartupError(
            f"training on a base quantized by {method!r} is not supported; use a dense, bitsandbytes or GPTQ one"
        )
    if options.quantize not in ("auto", form):
        raise StartupError(f"the base is quantized as {form} already; quantize={options.quantize} needs a dense base")
    return form


def _stored_form(found: dict[str, Any]) -> str | None:
    method = found.get("quant_method")
    if method == "gptq":
        return "gptq"
    if method != "bitsandbytes":
        return None
    if found.get("load_in_8bit", found.get("_load_in_8bit")):
        return "int8"
    return str(found.get("bnb_4bit_quant_type", "nf4"))


def _quantization(form: str, options: TrainOptions, dtype: torch.dtype) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    if form == "none":
        return {}
    if form == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=form,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == torch.float32 else dtype,
    )
    return {"quantization_config": wanted}


def _loading_dtype(form: str, dtype: torch.dtype) -> torch.dtype:
    """Quantized bases are read in bfloat16, whatever they multiply in: the values must be those that are served."""
    return dtype if form in ("none", "int8") or dtype == torch.float16 else torch.bfloat16
