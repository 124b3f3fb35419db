from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.answer_loss import answer_loss, base_loss
from adaplex_adapters.training.batches import pad_batch
from adaplex_adapters.training.encoding import IGNORED, EncodedExample
from adaplex_adapters.training.frozen_base import load_frozen_base
from adaplex_adapters.training.loop import Course, mean_loss
from adaplex_adapters.training.methods.attach import attach_adapter
from adaplex_adapters.training.optimizers import rate_at
from adaplex_adapters.training.options import TrainOptions, learning_rate_for
from adaplex_adapters.training.trainer import count_steps

CPU = torch.device("cpu")
EXAMPLES = [
    EncodedExample(i, tuple(range(i, i + 9 + i)), (IGNORED,) * 5 + tuple(range(i + 5, i + 9 + i))) for i in range(1, 5)
]


def test_the_rate_rises_then_falls_to_zero() -> None:
    rates = [rate_at(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001
    assert rate_at(0, 1, 0.0) == 1.0 and rate_at(0, 1, 0.5) == 1.0
    assert rate_at(4, 100, 10) == 0.5 and rate_at(0, 5, 100) == 0.2  # a number of steps


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_transformers_after_a_warm_up_that_is_a_step_ahead(name: str) -> None:
    from transformers import get_scheduler

    theirs = "constant_with_warmup" if name == "constant" else name
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(theirs, optimizer, num_warmup_steps=10, num_training_steps=50)
    for step in range(50):
        wanted = (step + 1) / 10 if step < 10 else schedule.get_last_lr()[0]
        assert rate_at(step, 50, 10, name) == pytest.approx(wanted, abs=1e-9)
        optimizer.step()
        schedule.step()


def test_the_loss_is_cross_entropy_on_the_answers_alone(base_folder: Path) -> None:
    """Against the model's own full logits, row by row without padding."""
    base = load_frozen_base(base_folder, "tiny", "cpu")
    wanted = 0.0
    for example in EXAMPLES:
        logits = base.model(input_ids=torch.tensor([example.ids])).logits[0, :-1].float()
        wanted += float(
            F.cross_entropy(logits, torch.tensor(example.labels[1:]), ignore_index=IGNORED, reduction="sum")
        )
    batch = pad_batch(EXAMPLES, pad_id=2)
    assert float(base_loss(base.model, batch, CPU)) == pytest.approx(wanted, rel=2e-3)
    adapter = attach_adapter(base, TrainOptions())  # B is zero: it changes nothing yet
    assert mean_loss(adapter, [batch], TrainOptions(), CPU) == pytest.approx(wanted / batch.learned, rel=2e-3)


def test_the_head_in_parts_gives_the_same_loss_and_gradient(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rows in (512, 3):
        monkeypatch.setattr("adaplex_adapters.training.answer_loss.HEAD_ROWS", rows)
        adapter = attach_adapter(load_frozen_base(base_folder, "tiny", "cpu"), TrainOptions(rank=2))
        loss = answer_loss(adapter, pad_batch(EXAMPLES, pad_id=2), CPU)
        loss.backward()
        found.append((float(loss), torch.cat([p.grad.flatten() for p in adapter.trained().values()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=2e-2, atol=2e-2 * float(found[0][1].abs().max()))


def test_families_that_change_their_logits_are_not_cut_short() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(**shape, num_key_value_heads=1, head_dim=16, vocab_size=64, final_logit_softcapping=0.5)
    model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    batch = pad_batch(EXAMPLES[:1], pad_id=2)
    logits = model(input_ids=batch.ids).logits[:, :-1].flatten(0, 1)
    wanted = F.cross_entropy(logits, batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
    assert float(base_loss(model, batch, CPU)) == pytest.approx(float(wanted), rel=1e-5)


def test_accumulated_batches_step_as_one_batch(base_folder: Path) -> None:
    """The mean is over all learned tokens of the step, so batches with few of them do not count more."""
    reports = []
    for accumulation, batches in ((1, [EXAMPLES]), (2, [EXAMPLES[:1], EXAMPLES[1:]])):
        base = load_frozen_base(base_folder, "tiny", "cpu")
        options = TrainOptions(rank=4, accumulation=accumulation)
        course = Course(attach_adapter(base, options), options, 1, 1e-3, CPU)
        reports.append(course.advance(iter([pad_batch(b, 2) for b in batches])))
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=2e-3)
    assert reports[0].gradient_norm == pytest.approx(reports[1].gradient_norm, rel=2e-2)
    assert reports[0].tokens == reports[1].tokens == sum(len(e.ids) for e in EXAMPLES)


def test_a_diverging_run_says_what_to_do(base_folder: Path) -> None:
    base = load_frozen_base(base_folder, "tiny", "cpu")
    options = TrainOptions(rank=4)
    adapter = attach_adapter(base, options)
    with torch.no_grad():
        for parameter in adapter.trained().values():
            parameter.fill_(1e30)
    with pytest.raises(InvalidRequest, match=r"lower learning rate than 0\.1"):
        Course(adapter, options, 1, 0.1, CPU).advance(iter([pad_batch(EXAMPLES, 2)]))


def test_options_are_checked_and_derived() -> None:
    for name, value in (("rank", 0), ("rank", 257), ("epochs", 0), ("learning_rate", -1.0), ("targets", ())):
        with pytest.raises(InvalidRequest, match=name) as caught:
            TrainOptions(**{name: value})
        assert caught.value.param == name
    assert TrainOptions(rank=4).lora_alpha == 8 and TrainOptions(alpha=3).lora_alpha == 3
    assert learning_rate_for(4096) == pytest.approx(2e-4) and learning_rate_for(64) == 2e-3
    assert count_steps(100, TrainOptions(batch_size=16, epochs=2)) == 14
    assert count_steps(100, TrainOptions(batch_size=16, epochs=2, accumulation=4)) == 4
    assert count_steps(100, TrainOptions(batch_size=16, max_steps=5)) == 5
    assert count_steps(1, TrainOptions(epochs=0.01)) == 1
