"""Prompt encoders of a trainer's checkpoint, run once: the same as what PEFT saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.reader import read_unfitted

NAMES = ["prompt_tuning", "p_tuning", "p_tuning lstm", "prefix_tuning", "prefix_tuning projected"]


def make_raw(folder: Path, adapted: Any, prefix: str) -> None:
    """Replace what PEFT saves by the parameters of its encoder."""
    state = adapted.prompt_encoder["default"].state_dict()
    save_file(
        {prefix + name: tensor.contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors"
    )


@pytest.mark.parametrize("prefix", ["prompt_encoder.default.", "base_model.prompt_encoder.default.", ""])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_run_once(name: str, prefix: str, save_kind: Any) -> None:
    folder, adapted = save_kind(name)
    saved = read_unfitted(folder)
    make_raw(folder, adapted, prefix)
    found = read_unfitted(folder)
    assert found.spec.kind == saved.spec.kind and found.spec.virtual_tokens == saved.spec.virtual_tokens
    for (_, tensor), (_, expected) in zip(found.tensors(), saved.tensors(), strict=True):
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_encoder_is_refused(name: str, save_kind: Any) -> None:
    folder, adapted = save_kind(name)
    make_raw(folder, adapted, "")
    file = folder / "adapter_model.safetensors"
    good = load_file(file)
    for key in good:
        for bad in (None, good[key][:-1], torch.zeros(3, 3, 3)):
            tensors = dict(good)
            del tensors[key]
            save_file({**tensors, **({} if bad is None else {key: bad.contiguous()})}, file)
            with pytest.raises(InvalidAdapter, match=f"{key}|no tensors|encoder"):
                read_unfitted(folder)
    save_file({**good, "more.weight": torch.ones(1)}, file)
    with pytest.raises(InvalidAdapter, match=r"more\.weight would stay unused"):
        read_unfitted(folder)


def test_a_small_file_does_not_become_a_large_prefix(save_kind: Any) -> None:
    folder, _ = save_kind("prefix_tuning projected")
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields |= {"num_virtual_tokens": 4096, "num_layers": 1 << 19, "encoder_hidden_size": 1}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(InvalidAdapter, match="more than"):
        read_unfitted(folder)
