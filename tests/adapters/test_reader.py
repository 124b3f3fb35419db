"""The reader against PEFT (same modules, tensors and scalings) and against everything that must be refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.errors import InvalidAdapter, NotFound
from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.reader import read_adapter, read_unfitted
from adaplex_adapters.spec import Adapter

Q0 = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q0}.lora_"

LORAS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "all linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "rsLoRA": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["up_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 7,
        "target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj"],
        # PEFT sorts these when it saves them, and the first match wins when it loads: keep them sorted.
        "rank_pattern": {r"layers\.1\..*": 6, "model.layers.0.mlp.gate_proj": 1, "q_proj": 2},
        "alpha_pattern": {r".*\.1\.self_attn\.\w+": 3, "gate_proj": 11},
    },
    "patterns with rsLoRA": {
        "r": 8,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"^model.layers.0.*q_proj": 5},
        "alpha_pattern": {"v_proj": 1},
    },
    "expression": {"r": 4, "lora_alpha": 8, "target_modules": r"model\.layers\.1\..*(q|up)_proj"},
    "layers": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "excluded": {"r": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*0\.self_attn\.q_proj"},
    "gaussian": {"r": 1, "target_modules": ["o_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
}
NEOX: dict[str, dict[str, Any]] = {
    "fused": {"r": 4, "lora_alpha": 16, "target_modules": ["query_key_value"]},
    "all": {"r": 2, "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
}


def assert_is_pefts(found: Adapter, adapted: Any) -> None:
    theirs = {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    assert found.modules.keys() == theirs.keys()
    for path, module in found.modules.items():
        assert torch.equal(module.a, theirs[path].lora_A["default"].weight.detach())
        assert torch.equal(module.b, theirs[path].lora_B["default"].weight.detach())
        assert module.scaling == float(np.float32(theirs[path].scaling["default"]))
    assert found.spec.rank == max(module.r["default"] for module in theirs.values())
    assert found.spec.parameters == sum(m.a.numel() + m.b.numel() for m in found.modules.values())
    assert found.spec.nbytes == 4 * found.spec.parameters


@pytest.mark.parametrize("variant", LORAS)
def test_reads_what_peft_saves(variant: str, tiny_llama: Any, shape_of: Any, save_peft: Any) -> None:
    from peft import LoraConfig, PeftModel

    model = tiny_llama()
    shape = shape_of(model)
    folder, adapted = save_peft(model, LoraConfig(**LORAS[variant]))
    found = read_adapter(folder, shape)
    assert_is_pefts(found, adapted)
    assert_is_pefts(found, PeftModel.from_pretrained(tiny_llama(), folder))
    assert list(found.modules) == [path for path in shape.linears if path in found.modules]


@pytest.mark.parametrize("variant", NEOX)
def test_reads_fused_modules(variant: str, tiny_neox: Any, shape_of: Any, save_peft: Any) -> None:
    from peft import LoraConfig

    model = tiny_neox()
    shape = shape_of(model)
    folder, adapted = save_peft(model, LoraConfig(**NEOX[variant]))
    found = read_adapter(folder, shape)
    assert_is_pefts(found, adapted)
    assert "query_key_value" in found.spec.targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keeps_dtypes(dtype: torch.dtype, write_lora: Any, base: BaseShape) -> None:
    found = read_adapter(write_lora(dtype=dtype), base)
    assert all(module.a.dtype == module.b.dtype == dtype for module in found.modules.values())
    assert found.spec.targets == ("q_proj", "v_proj") and found.spec.rank == 4


def test_keys_with_the_adapters_name(write_lora: Any, base: BaseShape) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    named, plain = write_lora(change=rename), write_lora()
    assert read_adapter(named, base).spec == read_adapter(plain, base).spec


def test_memory_is_its_own(write_lora: Any, base: BaseShape) -> None:
    folder = write_lora()
    found = read_adapter(folder, base)
    before = found.modules[Q0].a.clone()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert torch.equal(found.modules[Q0].a, before)


def put(key: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(key, value)


def fill(value: float, half: str = "A") -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{KEY}{half}.weight"].view(-1)[-1] = value

    return change


def drop(key: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(key)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": ({"change": fill(float("nan"))}, f"lora_A of {Q0} holds NaN"),
    "infinity": ({"change": fill(float("-inf"), "B")}, f"lora_B of {Q0} holds NaN or infinity"),
    "half infinity": ({"change": fill(float("inf")), "dtype": torch.float16}, "infinity"),
    "bfloat16 NaN": ({"change": fill(float("nan")), "dtype": torch.bfloat16}, "NaN"),
    "missing B": ({"change": drop(f"{KEY}B.weight")}, f"{Q0} has no lora_B"),
    "missing A": ({"change": drop(f"{KEY}A.weight")}, f"{Q0} has no lora_A"),
    "empty": ({"change": dict.clear}, "no tensors"),
    "extra": ({"change": put("extra", torch.ones(1))}, "extra would stay unused"),
    "no prefix": ({"change": put(f"{Q0}.lora_A.weight", torch.ones(4, 32))}, "unused"),
    "bias": ({"change": put(f"{KEY}B.bias", torch.ones(32))}, "bias"),
    "magnitude": ({"change": put(f"{KEY}magnitude_vector.weight", torch.ones(32))}, "DoRA"),
    "embedding": (
        {"change": put("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 64))},
        "embedding",
    ),
    "head": ({"change": put("base_model.model.lm_head.weight", torch.ones(4, 64))}, r"copies lm_head .* \[4, 64\]"),
    "other name": ({"change": put(f"{KEY}A.second.weight", torch.ones(4, 32))}, "second.weight would stay unused"),
    "twice": ({"change": put(f"{KEY}A.default.weight", torch.ones(4, 32))}, "twice"),
    "vector": ({"change": put(f"{KEY}A.weight", torch.ones(4))}, "matrix"),
    "rank 0": ({"change": put(f"{KEY}A.weight", torch.ones(0, 32))}, "rank 0"),
    "rank too large": ({"change": put(f"{KEY}A.weight", torch.ones(300, 32))}, "rank 300"),
    "ranks differ": ({"change": put(f"{KEY}A.weight", torch.ones(5, 32))}, "rank 5, but .* rank 4"),
    "config's rank": ({"config": {"r": 8}}, "rank 4, but .* rank 8"),
    "pattern's rank": ({"config": {"rank_pattern": {"v_proj": 2}}}, "v_proj .* rank 2"),
    "wrong width": ({"change": put(f"{KEY}A.weight", torch.ones(4, 33))}, r"A \[4, 33\].* \[4, 32\]"),
    "wrong height": ({"change": put(f"{KEY}B.weight", torch.ones(31, 4))}, r"B \[31, 4\].* \[32, 4\]"),
    "target without tensors": (
        {"config": {"target_modules": ["q_proj", "v_proj", "o_proj"]}},
        r"layers\.0\.self_attn\.o_proj is targeted .* no tensors",
    ),
    "tensors without target": ({"config": {"target_modules": ["q_proj"]}}, r"v_proj has tensors but is not targeted"),
    "target that is nowhere": (
        {"config": {"target_modules": ["q_proj", "v_proj", "o_projection"]}},
        "'o_projection', which no adapted module",
    ),
    "bomb": ({"config": {"target_modules": r"(?:(?:.?){9999}){9999}!"}}, "refused"),
    "pattern bomb": ({"config": {"rank_pattern": {r"((.*)*)*!": 4, r"(?:.{9999}){9999}": 1}}}, "refused"),
    "huge scaling": ({"config": {"lora_alpha": 1e11}}, "scaled"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("fault", REFUSED)
def test_refuses(fault: str, write_lora: Any, base: BaseShape) -> None:
    changes, message = REFUSED[fault]
    with pytest.raises(InvalidAdapter) as caught:
        read_adapter(write_lora(**changes), base)
    assert re.search(message, caught.value.message), caught.value.message
    assert caught.value.message.isascii() and len(caught.value.message) < 4000
    assert "/" not in caught.value.message  # no paths of the server


def test_missing_module(write_lora: Any, base: BaseShape) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{KEY}A.weight"], tensors[f"{KEY}B.weight"]

    with pytest.raises(InvalidAdapter, match=f"{Q0} is targeted"):
        read_adapter(write_lora(change=remove), base)


def test_wrong_base_says_so(write_lora: Any, base: BaseShape, make_base: Callable[..., BaseShape]) -> None:
    wider = write_lora(shape=make_base(hidden=64), config={"base_model_name_or_path": "org/large"})
    with pytest.raises(InvalidAdapter, match=r"Wrong base.*tiny-llama.*'org/large'.*\[4, 64\].*\[4, 32\]"):
        read_adapter(wider, base)
    with pytest.raises(InvalidAdapter, match=r"layers\.2\.self_attn\.q_proj is not an adaptable module"):
        read_adapter(write_lora(shape=make_base(layers=3)), base)
    with pytest.raises(InvalidAdapter, match="no tensors; the adapter is incomplete"):
        read_adapter(write_lora(shape=make_base(layers=1)), base)


def test_zeros_are_read(write_lora: Any, base: BaseShape) -> None:
    """Whether an adapter does anything is the proof's business."""

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.zero_()

    assert read_adapter(write_lora(change=zero, config={"lora_alpha": 0}), base).spec.parameters > 0


def test_limits(write_lora: Any, base: BaseShape) -> None:
    folder = write_lora()
    for limits, message in (
        (ReadLimits(max_rank=3), "ranks up to 3"),
        (ReadLimits(max_config_bytes=20), "at most 20"),
        (ReadLimits(max_file_bytes=100), "at most 100"),
        (ReadLimits(max_header_bytes=100), "at most 100"),
        (ReadLimits(max_tensors=3), "at most 3"),
        (ReadLimits(max_files=1), "more than 1"),
    ):
        with pytest.raises(InvalidAdapter, match=message):
            read_adapter(folder, base, limits)


def test_a_config_of_a_gigabyte_is_not_read(write_lora: Any, base: BaseShape) -> None:
    folder = write_lora()
    os.truncate(folder / "adapter_config.json", 1 << 30)
    with pytest.raises(InvalidAdapter, match="1073741824"):
        read_adapter(folder, base)


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pt", "evil.PKL", "x.pth", "model.ckpt"])
def test_pickles_are_never_opened(name: str, write_lora: Any, base: BaseShape, tmp_path: Path) -> None:
    folder = write_lora()
    marker = tmp_path / "ran"
    (folder / name).write_bytes(pickle.dumps(_Evil(str(marker))))
    accessed = (folder / name).stat().st_atime_ns
    with pytest.raises(InvalidAdapter, match="pickle"):
        read_adapter(folder, base)
    (folder / "adapter_model.safetensors").write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    with pytest.raises(InvalidAdapter, match="safetensors"):
        read_adapter(folder, base)
    assert not marker.exists() and accessed


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_leftovers_of_a_trainer_are_ignored(write_lora: Any, base: BaseShape) -> None:
    folder = write_lora()
    for name in ("README.md", "training_args.bin", "optimizer.pt", "rng_state_0.pth", "tokenizer.json", "recipe.py"):
        (folder / name).write_bytes(b"x")
    (folder / "checkpoint-10").mkdir()
    assert read_adapter(folder, base).spec.rank == 4


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder", "socket"])
@pytest.mark.timeout(20)
def test_only_regular_files(name: str, kind: str, write_lora: Any, base: BaseShape, tmp_path: Path) -> None:
    folder = write_lora()
    path = folder / name
    aside = tmp_path / "aside"
    if path.exists():
        path.rename(aside)
    else:
        aside.write_text("hello")
    if kind == "link":
        path.symlink_to(aside)
    elif kind == "dangling":
        path.symlink_to("/nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        os.chdir(folder)
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(name)
    if (name, kind) == ("README.md", "folder"):
        read_adapter(folder, base)
        return
    with pytest.raises(InvalidAdapter, match="regular"):
        read_adapter(folder, base)


def test_missing_things(write_lora: Any, base: BaseShape, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_adapter(tmp_path / "nowhere", base)
    with pytest.raises(NotFound):
        read_adapter(write_lora() / "adapter_config.json", base)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        folder = write_lora()
        (folder / name).unlink()
        with pytest.raises(InvalidAdapter, match=f"{name} is missing"):
            read_adapter(folder, base)
    folder = write_lora()
    (folder / "adapter_model-00001.safetensors").write_bytes(b"x")
    with pytest.raises(InvalidAdapter, match="would stay unused"):
        read_adapter(folder, base)


def test_a_file_that_changes_while_it_is_read(write_lora: Any, base: BaseShape, monkeypatch: Any) -> None:
    folder = write_lora()
    real = os.readv

    def touching(descriptor: int, into: Any) -> int:
        with open(folder / "adapter_model.safetensors", "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x01")
        os.utime(folder / "adapter_model.safetensors", ns=(1, os.stat(descriptor).st_mtime_ns + 1))
        return real(descriptor, into)

    monkeypatch.setattr(os, "readv", touching)
    with pytest.raises(InvalidAdapter, match="changed while"):
        read_adapter(folder, base)
    monkeypatch.setattr(os, "readv", lambda descriptor, into: 0)
    with pytest.raises(InvalidAdapter, match="shorter while"):
        read_adapter(folder, base)


def test_unfitted_is_the_same_adapter(write_lora: Any, base: BaseShape) -> None:
    folder = write_lora()
    assert read_unfitted(folder).spec == read_adapter(folder, base).spec


def test_base_name_is_kept_for_information(write_lora: Any, base: BaseShape) -> None:
    folder = write_lora(config={"base_model_name_or_path": "org/base"})
    assert read_adapter(folder, base).spec.base_model == "org/base"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4
