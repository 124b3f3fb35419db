"""A training step's loss and gradients against those of PEFT on bitsandbytes' own linears."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adaplex_adapters.training.batches import Batch
from adaplex_adapters.training.frozen_base import FrozenBase, quicken
from adaplex_adapters.training.loop import Course
from adaplex_adapters.training.methods.attach import attach_adapter
from adaplex_adapters.training.methods.peft_adapter import PeftAdapter, lora_model
from adaplex_adapters.training.options import TrainOptions

LENGTH = 61
OPTIONS = TrainOptions(rank=4, gradient_checkpointing=False, held_out=0.0)


@pytest.fixture
def base(device: torch.device) -> FrozenBase:
    pytest.importorskip("bitsandbytes")
    from adaplex_loadtest.random_training_base import random_base

    return random_base("tiny", device)


def batch_of(seed: int) -> Batch:
    ids = torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, ids.clone(), 2 * (LENGTH - 1), 2 * LENGTH)


@torch.no_grad()
def stir(parameters: list[torch.nn.Parameter]) -> None:
    torch.manual_seed(5)
    for parameter in parameters:
        parameter.add_(torch.randn_like(parameter) * 0.05)


def by_peft(base: FrozenBase, batch: Batch) -> tuple[float, list[torch.Tensor]]:
    torch.manual_seed(OPTIONS.seed)
    model = lora_model(base.model, OPTIONS)
    trained = [p for p in model.parameters() if p.requires_grad]
    stir(trained)
    ids = batch.ids.to(base.device)
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    PeftAdapter(model).detach()
    return float(loss.detach()), [p.grad for p in trained]


@pytest.fixture(autouse=True)
def unordered(poisoned: None) -> None:
    """Sums in any order: ordering them is not what graphs are recorded with."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_launched_and_replayed_steps_are_those_of_peft(checkpointing: bool, base: FrozenBase) -> None:
    wanted, theirs = by_peft(base, batch_of(3))
    quicken(base.model)
    adapter = attach_adapter(base, replace(OPTIONS, gradient_checkpointing=checkpointing))
    trained = list(adapter.trained().values())
    stir(trained)
    course = Course(adapter, OPTIONS, 100, 1e-4, base.device)
    assert course._graphs is not None and course._steady is not None
    # The first pass of a shape is launched, the second recorded, the third replayed with other ids before it.
    for seed in (3, 3, 8, 3):
        course._loss.zero_()
        course._steady.zero()
        course.learn([batch_of(seed)])
    assert len(course._graphs._graphs) == 1
    assert float(course._loss) == pytest.approx(wanted, rel=5e-3)
    for parameter, gradient in zip(trained, theirs, strict=True):
        assert float((parameter.grad - gradient).norm() / gradient.norm()) < 0.05


def test_a_replayed_pass_is_the_launched_one(base: FrozenBase) -> None:
    quicken(base.model)
    found = []
    for graphs in (True, False):
        adapter = attach_adapter(base, OPTIONS)
        stir(list(adapter.trained().values()))
        course = Course(adapter, OPTIONS, 100, 1e-3, base.device, graphs)
        found.append([course.advance(iter([batch_of(seed)])).loss for seed in range(6)])
        adapter.detach()
    assert found[0] == pytest.approx(found[1], rel=2e-3)
