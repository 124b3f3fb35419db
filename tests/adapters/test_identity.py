from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.reader import read_adapter


def revision(folder: Any, base: BaseShape) -> str:
    return read_adapter(folder, base).spec.revision


def test_how_it_is_written_does_not_matter(write_lora: Any, base: BaseShape) -> None:
    folder = write_lora()
    first = revision(folder, base)
    assert len(first) == 64 and set(first) <= set("0123456789abcdef")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    keys = sorted(tensors, key=lambda key: key[::-1])
    header, at, data = {}, 0, b""
    for key in keys:  # another order of the data, which the library would not write
        size = tensors[key].nbytes
        header[key] = {"dtype": "F32", "shape": list(tensors[key].shape), "data_offsets": [at, at + size]}
        data += tensors[key].numpy().tobytes()
        at += size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert revision(folder, base) == first
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"lora_dropout": 0.3, "base_model_name_or_path": "elsewhere", "task_type": "CAUSAL_LM"}
    config |= {"target_modules": r".*\.[qv]_proj", "r": 64, "rank_pattern": {".*": 4}, "inference_mode": True}
    config |= {"use_rslora": True, "lora_alpha": 4, "alpha_pattern": {}}  # 4 / sqrt(4) is 8 / 4
    (folder / "adapter_config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert revision(folder, base) == first


def test_what_it_does_matters(write_lora: Any, base: BaseShape) -> None:
    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values())).view(-1)[0] += 1

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        one, other = (f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight" for layer in (0, 1))
        tensors[one], tensors[other] = tensors[other], tensors[one]

    variants = [
        write_lora(),
        write_lora(config={"lora_alpha": 16}),
        write_lora(config={"alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 9}}),
        write_lora(config={"use_rslora": True, "lora_alpha": 7}),
        write_lora(change=nudge),
        write_lora(change=swap),
        write_lora(dtype=torch.bfloat16),
        write_lora(seed=1),
        write_lora(targets=("q_proj",)),
    ]
    revisions = [revision(folder, base) for folder in variants]
    assert len(set(revisions)) == len(revisions)


def test_zero_and_minus_zero_differ(write_lora: Any, base: BaseShape) -> None:
    """Identity is of bytes: simple, and never merges what some kernel could tell apart."""
    folders = [
        write_lora(change=lambda tensors, zero=zero: next(iter(tensors.values())).fill_(zero)) for zero in (0.0, -0.0)
    ]
    assert revision(folders[0], base) != revision(folders[1], base)


def test_it_does_not_drift(write_lora: Any, base: BaseShape) -> None:
    """Stored adapters are found again by later versions: this digest may change only with the scheme's name."""
    folder = write_lora(targets=("q_proj",), rank=1)
    tensors = {
        key: torch.full_like(value, 0.5) for key, value in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    assert revision(folder, base) == "a8aa7a97efcc6f253dd90a67ee0caba0c0792397fff5b5075bd3ea93188c9044"
