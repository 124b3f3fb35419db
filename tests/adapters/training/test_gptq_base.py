"""GPTQ bases: the weights are those that the server multiplies with, and gradients pass through them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex_adapters.errors import StartupError
from adaplex_adapters.training.conversations import Completion
from adaplex_adapters.training.frozen_base import load_frozen_base
from adaplex_adapters.training.gptq_base import load_gptq_model
from adaplex_adapters.training.gptq_linear import GptqLinear, dequantize_gptq, gptq_tensors
from adaplex_adapters.training.methods.attach import attach_adapter
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.trainer import train_adapter
from adaplex_server.bases.gptq_quantizer import GptqRecipe, quantize
from support.quiet_progress import Quiet

CPU = torch.device("cpu")


def module(recipe: GptqRecipe, rows: int = 24, columns: int = 64) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    weight, inputs = torch.randn(rows, columns), torch.randn(200, columns) * torch.rand(columns)
    return weight, quantize(weight, inputs.t() @ inputs, recipe)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_the_values_are_those_that_are_served(act_order: bool, symmetric: bool, version: int) -> None:
    from adaplex_server.kernels import gptq

    recipe = GptqRecipe(group=32, symmetric=symmetric, act_order=act_order)
    weight, tensors = module(recipe)
    config = recipe.config() | {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    state = {f"x.{name}": tensor for name, tensor in tensors.items()}
    ours = dequantize_gptq(gptq_tensors(state, "x", config), torch.float32)
    parts = (tensors["qweight"], tensors["qzeros"], tensors["scales"], tensors["g_idx"])
    theirs = gptq.dequantize(gptq.from_autogptq(*parts, 32, version))
    assert torch.allclose(ours, theirs.float(), atol=1e-6)
    if version == 1:
        assert float((ours - weight).norm() / weight.norm()) < 0.15


def test_gradients_are_those_of_the_dense_weight() -> None:
    recipe = GptqRecipe(group=32)
    _, tensors = module(recipe)
    linear = GptqLinear(
        gptq_tensors({f"x.{k}": v for k, v in tensors.items()}, "x", recipe.config()), None, torch.float32
    )
    x, other = (torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    linear(x).square().sum().backward()
    torch.nn.functional.linear(other, linear.weight).square().sum().backward()
    assert x.grad is not None and other.grad is not None
    assert torch.allclose(x.grad, other.grad, rtol=1e-5, atol=1e-4)
    assert not list(linear.parameters())


def test_what_is_not_autogptqs_four_bits_is_refused() -> None:
    recipe = GptqRecipe(group=32)
    state = {f"x.{k}": v for k, v in module(recipe)[1].items()}
    for change in ({"bits": 3}, {"checkpoint_format": "marlin"}):
        with pytest.raises(StartupError, match="4 bits"):
            gptq_tensors(state, "x", recipe.config() | change)


@pytest.fixture(scope="module")
def gptq_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with every linear of its layers in GPTQ's four bits."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("gptq") / "base"
    shutil.copytree(base_folder, folder)
    recipe, tensors = GptqRecipe(group=32, act_order=True), load_file(folder / "model.safetensors")
    made: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if "proj" in name:
            moments = torch.eye(tensor.shape[1]) * torch.linspace(1, 2, tensor.shape[1])
            path = name.removesuffix(".weight")
            made |= {f"{path}.{k}": v.contiguous() for k, v in quantize(tensor, moments, recipe).items()}
        else:
            made[name] = tensor
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": recipe.config()}))
    return folder


@pytest.mark.parametrize(
    "extra", [{}, {"dora": True}, {"method": "ia3"}, {"init": "pissa"}, {"method": "prompt_tuning"}]
)
def test_adapters_are_trained_on_it(extra: dict[str, Any], gptq_folder: Path, tmp_path: Path) -> None:
    rows = tuple(Completion(i + 1, f"{i} is", f" {2 * i}") for i in range(16))
    options = TrainOptions(**{"batch_size": 8, "max_steps": 4, "rank": 2, **extra})
    base = load_frozen_base(gptq_folder, "tiny", "cpu", options)
    assert base.form == "gptq"
    assert train_adapter(rows, base, tmp_path / "out", options, Quiet()).loss_last > 0


def test_packed_and_expanded_linears_train_alike(gptq_folder: Path) -> None:
    """A GPU keeps the four bits and expands them in each pass; a CPU keeps the expanded values."""
    from dataclasses import replace

    quantization = json.loads((gptq_folder / "config.json").read_text())["quantization_config"]
    expanded = load_frozen_base(gptq_folder, "tiny", "cpu", TrainOptions(precision="fp32"))
    packed = replace(
        expanded, model=load_gptq_model(gptq_folder, quantization, torch.float32, CPU).requires_grad_(False)
    )
    assert sum(isinstance(m, GptqLinear) for m in packed.model.modules()) == 14
    ids, found = torch.arange(5, 25).view(2, 10), []
    for base in (expanded, packed):
        for given in (TrainOptions(rank=2), TrainOptions(rank=2, dora=True)):
            adapter = attach_adapter(base, given)
            base_logits = adapter.model(input_ids=ids).logits.float()
            base_logits.square().mean().backward()
            found.append(torch.cat([p.grad.flatten() for p in adapter.trained().values() if p.grad is not None]))
            adapter.detach()
    for expanded_gradient, packed_gradient in ((found[0], found[2]), (found[1], found[3])):
        assert torch.allclose(expanded_gradient, packed_gradient, rtol=1e-3, atol=1e-5)
