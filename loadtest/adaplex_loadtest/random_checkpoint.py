"""Writes a quantized checkpoint of any shape with random weights, for measuring a whole server where no real one is.

The tokenizer is a real one's, copied; its vocabulary may be smaller than the shape's, never larger. One file a layer,
so that memory holds one layer at a time. Owns nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from adaplex_adapters.errors import InvalidRequest
from adaplex_loadtest.shapes import SHAPES, shape_config
from adaplex_server.kernels import nf4
from adaplex_server.model.config import ModelConfig
from adaplex_server.model.families import FAMILIES, base_shape, layer_path, norm_path
from adaplex_server.model.formats.nf4 import serialized

Format = Literal["nf4", "gptq"]
Tensors = dict[str, torch.Tensor]
GROUP = 128
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_QUANTIZATION: dict[str, dict[str, Any]] = {
    "nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
}


@torch.no_grad()
def write_random_checkpoint(folder: Path, shape: str, form: Format, tokenizer: Path) -> Path:
    """The folder, which must not exist yet. Made on the GPU where there is one; some 10 s for 8b there."""
    if folder.exists():
        raise InvalidRequest(f"{folder} exists already; name a folder that does not")
    config = shape_config(shape)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    known = _known_tokens(tokenizer) or config.vocab_size
    for part, tensors in enumerate(_parts(config, form, device, known)):
        name = f"model-{part:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    stated = SHAPES[shape] | {"quantization_config": _QUANTIZATION[form]}
    (folder / "config.json").write_text(json.dumps(stated, indent=1))
    for file in TOKENIZER_FILES:
        if (tokenizer / file).exists():
            shutil.copy(tokenizer / file, folder / file)
    return folder


def _known_tokens(tokenizer: Path) -> int | None:
    """How many tokens the tokenizer has; None where there is none."""
    if not (tokenizer / "tokenizer.json").exists():
        return None
    from tokenizers import Tokenizer

    return int(Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size())


def _parts(config: ModelConfig, form: Format, device: torch.device, known: int) -> Iterator[Tensors]:
    """Embedding, head and last norm; then layer by layer. Tokens that the tokenizer does not know have zeros in the
    head, so that they are never the likeliest: they would have no text to stream.
    """
    family = FAMILIES[config.family]
    embedding = {f"{family.embedding}.weight": _dense(config.vocab_size, config.hidden_size, 1.0, device)}
    if not config.tied_head:
        scale = config.hidden_size**-0.5
        embedding[f"{family.head}.weight"] = _dense(config.vocab_size, config.hidden_size, scale, device)
        embedding[f"{family.head}.weight"][known:] = 0
    yield embedding | {f"{family.final_norm}.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16)}
    linears = base_shape(config).linears
    for layer in range(config.num_layers):
        prefix = layer_path(config, layer) + "."
        tensors = {
            f"{norm_path(config, layer, norm)}.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16)
            for norm in family.norms
        }
        for path, linear in linears.items():
            if path.startswith(prefix):
                tensors |= _linear(path, linear.out_features, linear.in_features, form, device)
        yield tensors


def _dense(rows: int, columns: int, scale: float, device: torch.device) -> torch.Tensor:
    return (torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * scale).cpu()


def _linear(path: str, out_features: int, in_features: int, form: Format, device: torch.device) -> Tensors:
    """Weights that keep the scale of their input."""
    if form == "nf4":
        weight = torch.randn(out_features, in_features, device=device) * in_features**-0.5
        quantized = nf4.quantize(weight, double_quant=True)
        return {
            name: tensor.cpu().contiguous()
            for name, tensor in serialized(f"{path}.weight", quantized, torch.bfloat16).items()
        }
    words = torch.randint(-(2**31), 2**31 - 1, (in_features // 8, out_features), dtype=torch.int32, device=device)
    groups = in_features // GROUP
    return {
        f"{path}.qweight": words.cpu(),
        # Zero points are stored minus one: 7 is the 8 in the middle.
        f"{path}.qzeros": torch.full((groups, out_features // 8), 0x77777777, dtype=torch.int32),
        # 4.6 is the root mean square of codes 0..15 about their middle.
        f"{path}.scales": torch.full((groups, out_features), in_features**-0.5 / 4.6, dtype=torch.float16),
        f"{path}.g_idx": torch.arange(in_features, dtype=torch.int32) // GROUP,
    }
