"""Bottleneck adapters in the layout of the `adapters` library."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.peft_folder import files_of
from adaplex_adapters.reader import read_adapter
from adaplex_adapters.store import AdapterStore
from adaplex_adapters.uploads import unpack_archive
from support.adapter_reference import logits
from support.bottleneck_folder import NAMED, write_bottleneck

IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def shape(tiny_llama: Any, full_shape: Any) -> BaseShape:
    return full_shape(tiny_llama())


@pytest.mark.parametrize(
    ("named", "places", "activation", "reads"),
    [
        ("seq_bn", {"mlp"}, "relu", "sum"),
        ("double_seq_bn", {"attention", "mlp"}, "silu", "block"),
        ("par_bn", {"mlp"}, "relu", "stream"),
        ("scaled_par_bn", {"mlp"}, "relu", "stream"),
        ("adapter_plus", {"mlp"}, "gelu", "sum"),
    ],
)
def test_named_configs(
    named: str, places: set[str], activation: str, reads: str, shape: BaseShape, tmp_path: Path
) -> None:
    folder = write_bottleneck(tmp_path / "x", named)
    adapter = read_adapter(folder, shape)
    assert adapter.bottlenecks.keys() == {(layer, place) for layer in (0, 1) for place in places}
    assert adapter.spec.bottleneck_size == 4 and adapter.spec.targets == tuple(sorted(places))
    saved = load_file(folder / "adapter.safetensors")
    prefix = "model.layers.1.output_adapters.adapters.task."
    one = adapter.bottlenecks[1, "mlp"]
    assert (one.activation, one.reads) == (activation, reads)
    for name, tensor in (
        ("adapter_down.0.weight", one.down),
        ("adapter_down.0.bias", one.down_bias),
        ("adapter_up.weight", one.up),
        ("adapter_up.bias", one.up_bias),
        ("scaling", one.scaling),
    ):
        default = torch.tensor([float(NAMED[named].get("scaling", 1.0))]) if name not in "".join(saved) else None
        assert torch.equal(tensor, default if default is not None else saved[prefix + name])


@pytest.mark.parametrize("named", NAMED)
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"leave_out": [1]},
        {"leave_out": [0]},
        {"reduction_factor": {"1": 3, "default": 16}},
        {"reduction_factor": 0.5},
    ],
)
def test_normalized_is_the_same(named: str, changed: dict[str, Any], shape: BaseShape, tmp_path: Path) -> None:
    adapter = read_adapter(write_bottleneck(tmp_path / "x", named, **changed), shape)
    kept = tmp_path / "kept"
    kept.mkdir()
    for name, pieces in files_of(adapter):
        (kept / name).write_bytes(b"".join(pieces))
    assert read_adapter(kept, shape).spec == adapter.spec


def test_it_does_something_and_zero_does_nothing(shape: BaseShape, tiny_llama: Any, tmp_path: Path) -> None:
    adapter = read_adapter(write_bottleneck(tmp_path / "x"), shape)
    plain = tiny_llama()(IDS).logits
    assert not torch.allclose(logits(tiny_llama(), adapter, IDS), plain, atol=1e-2)
    still = {at: replace(one, scaling=one.scaling * 0) for at, one in adapter.bottlenecks.items()}
    torch.testing.assert_close(logits(tiny_llama(), replace(adapter, bottlenecks=still), IDS), plain)


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "gpt_neox"])
def test_where_the_library_hooks_into_modules(model_type: str, shape: BaseShape, tmp_path: Path) -> None:
    """There the norm that a user names may come before the bottleneck, unless it reads the block alone."""
    base = replace(shape, family=model_type)
    read_adapter(write_bottleneck(tmp_path / "x", "double_seq_bn", model_type=model_type), base)
    for named in ("seq_bn", "par_bn"):
        with pytest.raises(InvalidAdapter, match="places norms and residuals"):
            read_adapter(write_bottleneck(tmp_path / named, named, model_type=model_type), base)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"phm_layer": True}, "Compacter"),
    ({"inv_adapter": "nice"}, "invertible"),
    ({"use_gating": True}, "gate"),
    ({"cross_adapter": True}, "cross-attention"),
    ({"ln_before": True}, "norm of its own before"),
    ({"ln_after": True}, "norm of its own after"),
    ({"original_ln_after": False}, "places norms and residuals"),
    ({"original_ln_before": True, "residual_before_ln": False}, "places norms and residuals"),
    ({"original_ln_before": True, "residual_before_ln": "post_add"}, "places norms and residuals"),
    ({"non_linearity": "mish"}, "non_linearity='mish'"),
    ({"scaling": "other"}, "scaling"),
    ({"mh_adapter": False, "output_adapter": False}, "neither"),
    ({"architecture": "lora"}, "Train this kind with PEFT"),
    ({"a_new_field": 3}, "does not know"),
    ({"outer": {"hidden_size": 64}}, "shape"),
    ({"outer": {"name": "other"}}, "names 'other'"),
    ({"model_type": "gpt2"}, "trained on a 'gpt2'"),
    ({"layers": 1}, "Layer 1 has no attention bottleneck"),
    ({"layers": 3}, "Layer 2 has an attention bottleneck"),
]


@pytest.mark.parametrize(("changed", "reason"), REFUSED)
def test_refuses(changed: dict[str, Any], reason: str, shape: BaseShape, tmp_path: Path) -> None:
    folder = write_bottleneck(tmp_path / "x")
    if not changed.keys() & {"layers", "outer", "model_type"}:
        fields = json.loads((folder / "adapter_config.json").read_text())
        fields["config"] |= changed
        (folder / "adapter_config.json").write_text(json.dumps(fields))
    else:
        folder = write_bottleneck(tmp_path / "y", **changed)
    with pytest.raises(InvalidAdapter, match=reason):
        read_adapter(folder, shape)


def test_both_weight_files(shape: BaseShape, tmp_path: Path) -> None:
    folder = write_bottleneck(tmp_path / "x")
    save_file(load_file(folder / "adapter.safetensors"), folder / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapter, match="one of them would stay unused"):
        read_adapter(folder, shape)
    (folder / "adapter.safetensors").unlink()
    assert read_adapter(folder, shape).spec.kind == "bottleneck"


def test_it_comes_through_an_archive(shape: BaseShape, tmp_path: Path) -> None:
    folder = write_bottleneck(tmp_path / "x")
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for file in folder.iterdir():
            made.write(file, f"x/{file.name}")
    unpack_archive(archive, tmp_path / "unpacked")
    assert read_adapter(tmp_path / "unpacked", shape).spec == read_adapter(folder, shape).spec
    store = AdapterStore(tmp_path / "store")
    revision = store.commit(read_adapter(folder, shape))
    assert store.read(revision, shape).spec.revision == revision
