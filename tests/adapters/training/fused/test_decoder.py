"""The decoder's own pass gives the values and gradients of transformers and PEFT."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex_adapters.training.answer_loss import answer_loss
from adaplex_adapters.training.batches import pad_batch
from adaplex_adapters.training.encoding import IGNORED, EncodedExample
from adaplex_adapters.training.frozen_base import FrozenBase, load_frozen_base
from adaplex_adapters.training.fused import decoder as fused
from adaplex_adapters.training.fused.decoder import fuse, fused_decoder
from adaplex_adapters.training.methods.attach import attach_adapter
from adaplex_adapters.training.methods.lora_bank import LoraBank
from adaplex_adapters.training.options import TrainOptions

CPU = torch.device("cpu")
PLAIN = TrainOptions(rank=4, precision="fp32", quantize="none", gradient_checkpointing=False)
BATCH = pad_batch(
    [
        EncodedExample(i, tuple(range(i, i + 9 + i)), (IGNORED,) * 3 + tuple(range(i + 3, i + 9 + i)))
        for i in (1, 2, 3, 4)
    ],
    pad_id=2,
)
VARIANTS = {
    "plain": PLAIN,
    "checkpointing": replace(PLAIN, gradient_checkpointing=True),
    "some": replace(PLAIN, targets=("q_proj", "down_proj"), rslora=True),
    "attention alone": replace(PLAIN, targets=("v_proj", "o_proj"), gradient_checkpointing=True),
    "dora": replace(PLAIN, dora=True, gradient_checkpointing=True),
    "ia3": replace(PLAIN, method="ia3"),
    "prompt": replace(PLAIN, method="prompt_tuning", virtual_tokens=3),
    "bottleneck": replace(PLAIN, method="bottleneck"),
}


@pytest.fixture(scope="module")
def base(base_folder: Path) -> FrozenBase:
    return load_frozen_base(base_folder, "tiny", "cpu", PLAIN)


@pytest.fixture(scope="module")
def quick(base: FrozenBase) -> FrozenBase:
    made = replace(base, model=copy.deepcopy(base.model))
    assert fuse(made.model) and fuse(made.model)
    return made


@torch.no_grad()
def stir(parameters: Any) -> None:
    """B is zero at first, and with it the gradient of A."""
    torch.manual_seed(5)
    for parameter in parameters:
        parameter.add_(torch.randn_like(parameter) * 0.05)


def gradients(base: FrozenBase, options: TrainOptions) -> tuple[float, dict[str, torch.Tensor]]:
    adapter = attach_adapter(base, options)
    stir(adapter.trained().values())
    adapter.model.train()
    try:
        loss = answer_loss(adapter, BATCH, CPU)
        loss.backward()
        return float(loss.detach()), {name: p.grad for name, p in adapter.trained().items() if p.grad is not None}
    finally:
        adapter.detach()


def alike(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, name
        assert float((ours[name] - gradient).norm() / gradient.norm()) < 1e-4, name


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_are_those_of_transformers_and_peft(name: str, base: FrozenBase, quick: FrozenBase) -> None:
    wanted, theirs = gradients(base, VARIANTS[name])
    found, ours = gradients(quick, VARIANTS[name])
    assert found == pytest.approx(wanted, rel=1e-5)
    alike(ours, theirs)


def test_adapters_of_a_bank_have_their_own_gradients(base: FrozenBase, quick: FrozenBase) -> None:
    results = []
    for each in (base, quick):
        bank = LoraBank(each, [replace(PLAIN, seed=i, alpha=4.0 * (i + 1)) for i in range(2)])
        stir(p for adapter in bank.adapters() for p in adapter.trained().values())
        with bank.shared([(0, 2), (1, 2)]):
            adapter = bank.adapters()[0]
            loss = answer_loss(adapter, BATCH, CPU)
            loss.backward()
        grads = {f"{i} {n}": p.grad for i, a in enumerate(bank.adapters()) for n, p in a.trained().items()}
        results.append((float(loss.detach()), grads))
        bank.detach()
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    alike(results[1][1], results[0][1])


def test_what_is_not_understood_goes_the_usual_way(quick: FrozenBase, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = fused_decoder(quick.model)
    assert decoder is not None
    calls: list[int] = []
    whole = fused.FusedDecoder._run
    monkeypatch.setattr(fused.FusedDecoder, "_run", lambda *given: calls.append(1) or whole(*given))
    ids = BATCH.ids
    with torch.no_grad():
        wanted = quick.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert not calls
        found = quick.model(input_ids=ids).logits
        assert calls and torch.allclose(found, wanted, atol=1e-4)
        quick.model.generate(input_ids=ids[:1, :5], max_new_tokens=2, use_cache=True)
    hook = quick.model.model.layers[0].mlp.register_forward_hook(lambda module, given, output: output)
    assert decoder.layers() is None
    hook.remove()
    assert decoder.layers() is not None
