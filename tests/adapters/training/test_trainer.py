from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from adaplex_adapters.errors import Conflict, InvalidRequest
from adaplex_adapters.reader import read_unfitted
from adaplex_adapters.training.conversations import Chat, Message
from adaplex_adapters.training.evaluation import evaluate_local, load_with_adapter
from adaplex_adapters.training.frozen_base import load_frozen_base
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.report.record import TrainResult
from adaplex_adapters.training.trainer import train_adapter
from support.quiet_progress import Quiet

WORDS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7"}


def row(line: int, question: str, answer: str) -> Chat:
    return Chat(line, (Message("user", question, False), Message("assistant", answer, True)))


ROWS = tuple(
    row(i + 1, f"{a} {b}", WORDS[a] + WORDS[b]) for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)
)
OPTIONS = TrainOptions(rank=8, batch_size=7, epochs=12, learning_rate=1e-2, held_out=0.1, seed=5)


def train(folder: Path, out: Path, options: TrainOptions = OPTIONS, rows: tuple[Chat, ...] = ROWS) -> TrainResult:
    return train_adapter(rows, load_frozen_base(folder, "tiny", "cpu"), out, options, Quiet())


@pytest.fixture(scope="module")
def trained(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(base_folder, tmp_path_factory.mktemp("trained") / "words")


def test_the_loss_falls_on_rows_that_were_never_learned(trained: TrainResult) -> None:
    assert trained.held_out == 5 and trained.examples == 44 and trained.steps == 84
    assert trained.held_out_before is not None and trained.held_out_after is not None
    assert trained.held_out_after < 0.7 * trained.held_out_before
    assert trained.loss_last < 0.7 * trained.loss_first


def test_the_result_is_a_peft_folder_that_our_reader_takes(trained: TrainResult) -> None:
    assert sorted(p.name for p in trained.out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    adapter = read_unfitted(trained.out)
    assert adapter.spec.base_model == "tiny" and adapter.spec.rank == 8
    assert adapter.spec.parameters == trained.parameters
    assert len(adapter.modules) == 14
    assert all(m.scaling == 2.0 and bool(m.b.any()) for m in adapter.modules.values())
    assert all(m.a.dtype == torch.bfloat16 for m in adapter.modules.values())


def test_the_config_holds_no_path_of_this_machine(trained: TrainResult, base_folder: Path) -> None:
    text = (trained.out / "adapter_config.json").read_text()
    assert "/" not in text and json.loads(text)["base_model_name_or_path"] == "tiny"


def test_peft_answers_with_it_as_measured(trained: TrainResult, base_folder: Path) -> None:
    """What was saved is what was measured: PEFT's loss with the saved files is the reported one."""
    from adaplex_adapters.training.answer_loss import base_loss
    from adaplex_adapters.training.batches import pad_batch
    from adaplex_adapters.training.encoding import encode_example
    from adaplex_adapters.training.split import split_examples

    base = load_with_adapter(load_frozen_base(base_folder, "tiny", "cpu"), trained.out)
    held = split_examples(ROWS, OPTIONS.held_out, OPTIONS.seed).held_out
    batch = pad_batch([encode_example(e, base.tokenizer) for e in held], 2)
    with torch.no_grad():
        loss = float(base_loss(base.model.get_base_model(), batch, base.device)) / batch.learned
    assert loss == pytest.approx(trained.held_out_after, rel=1e-2)


def test_equal_seeds_give_equal_adapters_and_the_base_files_stay(base_folder: Path, tmp_path: Path) -> None:
    def digest() -> str:
        return hashlib.sha256((base_folder / "model.safetensors").read_bytes()).hexdigest()

    before = digest()
    short = TrainOptions(rank=2, batch_size=8, max_steps=3, seed=1)
    revisions = [read_unfitted(train(base_folder, tmp_path / n, short).out).spec.revision for n in "ab"]
    other = TrainOptions(rank=2, batch_size=8, max_steps=3, seed=2)
    assert revisions[0] == revisions[1]
    assert read_unfitted(train(base_folder, tmp_path / "c", other).out).spec.revision != revisions[0]
    assert digest() == before


def test_targets_rslora_and_alpha_reach_the_adapter(base_folder: Path, tmp_path: Path) -> None:
    options = TrainOptions(rank=4, alpha=6, rslora=True, targets=("q_proj", "down_proj"), max_steps=1)
    adapter = read_unfitted(train(base_folder, tmp_path / "a", options).out)
    assert adapter.spec.targets == ("down_proj", "q_proj")
    assert {m.scaling for m in adapter.modules.values()} == {3.0}
    with pytest.raises(InvalidRequest, match="no_such_proj"):
        train(base_folder, tmp_path / "b", TrainOptions(targets=("no_such_proj",), max_steps=1))


def test_rows_that_are_too_long_are_left_out_and_told(base_folder: Path, tmp_path: Path) -> None:
    notes = Quiet()
    rows = (*ROWS[:3], row(77, "x" * 500, "y"))
    options = TrainOptions(max_length=200, max_steps=1)
    result = train_adapter(rows, load_frozen_base(base_folder, "tiny", "cpu"), tmp_path / "a", options, notes)
    assert (result.examples, result.too_long, result.held_out_before) == (3, 1, None)
    assert any("lines 77" in note for note in notes.notes)
    with pytest.raises(InvalidRequest, match="longer than max_length"):
        train(base_folder, tmp_path / "b", TrainOptions(max_length=20))


def test_only_an_adapter_is_ever_replaced(base_folder: Path, tmp_path: Path) -> None:
    short = TrainOptions(rank=2, max_steps=1)
    out = tmp_path / "a"
    first = read_unfitted(train(base_folder, out, short).out).spec.revision
    second = read_unfitted(train(base_folder, out, TrainOptions(rank=2, max_steps=1, seed=9)).out).spec.revision
    assert first != second
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "cat.jpg").touch()
    with pytest.raises(Conflict, match="not an adapter folder"):
        train(base_folder, precious, short)
    assert [p.name for p in precious.iterdir()] == ["cat.jpg"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "photos"]


def test_exact_match_counts_whole_answers(base_folder: Path) -> None:
    score = evaluate_local(load_frozen_base(base_folder, "tiny", "cpu"), ROWS[:4], batch_size=3)
    assert len(score.answers) == 4 and score.matched == 0 and score.rate == 0.0
