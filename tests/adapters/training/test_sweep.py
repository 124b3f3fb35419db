from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.reader import read_unfitted
from adaplex_adapters.training import carry_out as module
from adaplex_adapters.training.carry_out import TrainRequest, carry_out, carry_out_several, carry_out_together
from adaplex_adapters.training.events import read_events
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.sweep import MAX_VARIANTS, best_of, variants_of
from support.quiet_progress import Quiet


def test_every_combination_is_a_variant() -> None:
    found = variants_of(["rank=2,4", "lr=1e-3,1e-2"], TrainOptions(seed=7))
    assert list(found) == ["rank=2-lr=1e-3", "rank=2-lr=1e-2", "rank=4-lr=1e-3", "rank=4-lr=1e-2"]
    assert found["rank=4-lr=1e-3"] == TrainOptions(seed=7, rank=4, learning_rate=1e-3)
    many = "rank=" + ",".join(map(str, range(1, MAX_VARIANTS + 2)))
    for bad in (["rank"], ["rank="], ["rank=2", "rank=4"], ["quantize=nf4,int8"], ["nothing=1"], ["rank=0"], [many]):
        with pytest.raises(InvalidRequest):
            variants_of(bad, TrainOptions())


def test_several_adapters_on_one_loaded_base_are_what_each_is_alone(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []
    load = module.load_frozen_base
    monkeypatch.setattr(module, "load_frozen_base", lambda *given: loads.append(given[0]) or load(*given))
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i} is", "completion": f" {2 * i}"} for i in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = TrainOptions(batch_size=8, max_steps=3, held_out=0.2)
    request = TrainRequest(data, base_folder, "tiny", tmp_path / "out", tmp_path / "work", options, device="cpu")
    variants = variants_of(["rank=2,4"], options) | {"prompt": replace(options, method="prompt_tuning")}
    results = dict(carry_out_several(request.variants(variants), Quiet(), lambda: False))
    assert len(loads) == 1 and list(results) == ["rank=2", "rank=4", "prompt"]
    assert best_of(results, options) in results
    alone = replace(request, out=tmp_path / "alone", work=tmp_path / "alone.run", options=variants["rank=4"])
    carry_out(alone, False, Quiet())
    revisions = [read_unfitted(p).spec.revision for p in (tmp_path / "out" / "rank=4", tmp_path / "alone")]
    assert revisions[0] == revisions[1]


def test_variants_in_the_same_passes_have_the_same_folders(base_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i} is", "completion": f" {2 * i}"} for i in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = TrainOptions(batch_size=8, max_steps=3, held_out=0.2)
    request = TrainRequest(data, base_folder, "tiny", tmp_path / "out", tmp_path / "work", options, device="cpu")
    requests = request.variants(variants_of(["rank=2,4"], options))
    quiet = Quiet()
    results = carry_out_together(requests, quiet, lambda: False)
    assert list(results) == ["rank=2", "rank=4"] and any(
        note.startswith("rank=4: held-out loss") for note in quiet.notes
    )
    for name, own in requests.items():
        assert (own.out / "report.html").is_file() and read_unfitted(own.out).spec.rank == int(name[-1])
        events = list(read_events(own.work))
        assert events[-1]["type"] == "succeeded" and [e["step"] for e in events if e["type"] == "step"] == [1, 2, 3]
    small = {name: replace(own, memory_limit=2**20) for name, own in requests.items()}
    with pytest.raises(InvalidRequest, match="train fewer together"):
        carry_out_together(small, quiet, lambda: False)
