"""The benchmarks do the work that they report, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from adaplex_loadtest import shapes
from adaplex_loadtest.engine_bench import Batch, bench, settings_for
from adaplex_loadtest.random_checkpoint import write_random_checkpoint
from adaplex_loadtest.statistics import percentile, summary
from adaplex_server.model.base import load_base
from adaplex_server.model.config import parse_config, read_config
from adaplex_server.model.random_base import random_base

TINY = shapes.SHAPES["135m"] | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 256,
}


@pytest.mark.parametrize("format", ["nf4", "none"])
def test_the_engine_benchmark_reports_each_batch(tmp_path: Path, format: str) -> None:
    base = random_base(parse_config(TINY, {}, "tiny"), format, dtype=torch.float32)  # type: ignore[arg-type]
    batches = [Batch(1, 0, 5, 4), Batch(3, 2, 5, 4)]
    settings = settings_for(batches, 4, tmp_path, threads=1, page_size=16)
    lines = [json.loads(line) for line in bench(base, settings, batches, 4, repeats=1)]
    assert [(line["rows"], line["adapters"]) for line in lines] == [(1, 0), (3, 2)]
    assert all(line["step_ms"] > 0 and line["prefill_ms"] > 0 for line in lines)


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_every_shape_is_a_config_of_a_known_family(name: str) -> None:
    assert shapes.shape_config(name).family == "llama"


def test_percentiles() -> None:
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([5], 0.99) == 5
    assert math.isnan(percentile([], 0.5))
    assert summary([0.001, 0.002, 0.003])["p50"] == 2.0


@pytest.mark.parametrize("form", ["nf4", "gptq"])
def test_a_random_checkpoint_loads_as_a_real_one_does(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64})
    folder = write_random_checkpoint(tmp_path / "made", "tiny", form, tmp_path)  # type: ignore[arg-type]
    config = read_config(folder)
    place = {"dtype": torch.float32, "device": torch.device("cpu")}
    base = load_base(folder, config=config, quantize="nf4", double_quant=True, **place)  # type: ignore[arg-type]
    weight = base.layers[1].linears["down"].dequantized()
    assert weight.shape == (128, 256)
    assert 0.5 < weight.std() * 256**0.5 < 2, "a linear keeps the scale of its input"
