"""What graphs are recorded for; the recording itself needs a GPU (tests/gpu/training)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaplex_adapters.training.answer_loss import base_loss, hidden_states, place_loss
from adaplex_adapters.training.batches import pad_batch
from adaplex_adapters.training.encoding import IGNORED, EncodedExample
from adaplex_adapters.training.frozen_base import load_frozen_base
from adaplex_adapters.training.fused.decoder import fuse
from adaplex_adapters.training.methods.adapter import ModelInputs
from adaplex_adapters.training.micro_batch_graphs import _padded, can_record
from adaplex_adapters.training.options import TrainOptions

CPU = torch.device("cpu")
EXAMPLES = [
    EncodedExample(i, tuple(range(i, i + 9 + i)), (IGNORED,) * 5 + tuple(range(i + 5, i + 9 + i))) for i in range(1, 5)
]


@torch.no_grad()
def test_padding_changes_no_loss(base_folder: Path) -> None:
    base = load_frozen_base(base_folder, "tiny", "cpu", TrainOptions(quantize="none", precision="fp32"))
    batch = pad_batch(EXAMPLES, 2)
    inputs = _padded(batch, [0.5, 1.0], [3, 1])
    assert inputs.ids.shape == (4, 32) and inputs.shape == (4, 32, 64, 64)
    found = hidden_states(base.model, ModelInputs({"input_ids": inputs.ids}))
    for places, part in zip(inputs.places, (EXAMPLES[:3], EXAMPLES[3:]), strict=True):
        wanted = float(base_loss(base.model, pad_batch(part, 2), CPU))
        assert float(place_loss(base.model, found, places)) == pytest.approx(wanted, rel=1e-4)


def test_shapes_are_few() -> None:
    shapes = {_padded(pad_batch([e], 2), [1.0], [1]).shape for e in EXAMPLES}
    assert shapes == {(1, 32, 64)}
    silent = EncodedExample(1, (1, 2, 3), (IGNORED,) * 3)
    assert _padded(pad_batch([silent], 2), [1.0], [1]).shape == (1, 32, 64)


def test_nothing_is_recorded_on_a_cpu(base_folder: Path) -> None:
    base = load_frozen_base(base_folder, "tiny", "cpu", TrainOptions(quantize="none"))
    fuse(base.model)
    assert not can_record(base.model, TrainOptions(), CPU)
