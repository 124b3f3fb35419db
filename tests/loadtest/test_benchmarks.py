"""The benchmarks do the work that they report, on a tiny model."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from adaplex_adapters.errors import InvalidRequest
from adaplex_loadtest import kernel_bench, kinds_bench, profile_bench, random_kinds, shapes, swap_bench
from adaplex_loadtest.engine_bench import Batch, bench, settings_for
from adaplex_loadtest.random_checkpoint import write_random_checkpoint
from adaplex_loadtest.statistics import percentile, summary
from adaplex_server.model.base import load_base
from adaplex_server.model.config import parse_config, read_config
from adaplex_server.model.random_base import random_base

TINY = shapes.SHAPES["tiny"]


@pytest.mark.parametrize("format", ["nf4", "none"])
def test_the_engine_benchmark_reports_each_batch(tmp_path: Path, format: str) -> None:
    base = random_base(parse_config(TINY, {}, "tiny"), format, dtype=torch.float32)  # type: ignore[arg-type]
    batches = [Batch(1, 0, 5, 4), Batch(3, 2, 5, 4)]
    settings = settings_for(batches, 4, tmp_path, threads=1, page_size=16)
    lines = [json.loads(line) for line in bench(base, settings, batches, 4, repeats=1)]
    assert [(line["rows"], line["adapters"]) for line in lines] == [(1, 0), (3, 2)]
    assert all(line["step_ms"] > 0 and line["prefill_ms"] > 0 for line in lines)


def test_kinds_are_measured_beside_loras(tmp_path: Path) -> None:
    base = random_base(shapes.shape_config("tiny"), "gptq", dtype=torch.float32)
    batches = [Batch(9, 9, 5, 4)]
    sets = random_kinds.parse_kinds("all,lora+dora")
    settings = settings_for(batches, 4, tmp_path, threads=1, page_size=16)
    lines = [json.loads(line) for line in kinds_bench.bench(base, settings, batches, sets, 4, repeats=2)]
    assert [line["kinds"] for line in lines] == [list(random_kinds.KINDS), ["lora", "dora"]]
    assert all(line["goal"] == 1.15 and len(line["ratios"]) == 2 and line["ratio"] > 0 for line in lines)
    with pytest.raises(InvalidRequest, match="'lorra' is no kind"):
        random_kinds.parse_kinds("all,lorra+dora")


def test_the_kernel_benchmark_reports_each_kernel() -> None:
    base = random_base(shapes.shape_config("tiny"), "nf4", dtype=torch.bfloat16)
    lines = [json.loads(line) for line in kernel_bench.bench(base, kernel_bench.KernelLoad((1, 3), (1, 2), 4, (20,)))]
    linears = len(base.layers[0].linears)
    counts = Counter((line["rows"], line["kernel"]) for line in lines)
    assert counts[1, "linear"] == linears and counts[1, "linear and adapters"] == linears
    assert counts[3, "linear and adapters"] == 2 * linears, "with one adapter and with two"
    assert counts[3, "head"] == counts[3, "attention"] == 1
    assert all(line["us"] > 0 and line["mib"] > 0 for line in lines)


def test_the_profile_tells_the_step_and_its_parts(tmp_path: Path) -> None:
    base = random_base(shapes.shape_config("tiny"), "none", dtype=torch.float32)
    batches = [Batch(3, 2, 5, 40), Batch(1, 0, 5, 40)]
    settings = settings_for(batches, 4, tmp_path, threads=1, page_size=16)
    lines = [json.loads(line) for line in profile_bench.bench(base, settings, batches, 4, steps=3, most=4)]
    assert [line["what"] for line in lines] == ["step", *["kernel"] * 4] * 2
    step, kernels = lines[0], lines[1:5]
    assert step["step_us"] > 0 and step["kernels_us"] <= step["profiled_step_us"]
    assert sum(kernel["share"] for kernel in kernels) <= 1
    assert all(kernel["us_a_step"] > 0 and kernel["a_step"] >= 1 / 3 for kernel in kernels)


def test_overlapping_kernels_count_once() -> None:
    spans = [(0, 4), (2, 6), (3, 5), (8, 9), (9, 10)]
    assert profile_bench._covered([profile_bench.Kernel("k", *span) for span in reversed(spans)]) == 8


def test_the_swap_benchmark_brings_what_it_says(tmp_path: Path) -> None:
    base = random_base(shapes.shape_config("tiny"), "none", dtype=torch.float32)
    load = swap_bench.SwapLoad(
        rank=4, rows=4, adapters=2, swaps=50, seconds=0.2, contents=10, prompt=5, output=5, registered=20, slots=6,
        requests=24,
    )  # fmt: skip
    lines = [json.loads(line) for line in swap_bench.bench(base, load, tmp_path, 1)]
    assert [line["what"] for line in lines] == ["cold from pinned", "cold from file", *["churn"] * 5, "zipf"]
    churn = {line["beside"]: line for line in lines[2:7]}
    assert churn["nothing"]["a_second"] == 0 and churn["swap from file"]["a_second"] > 0
    assert lines[-1]["swaps"] > 0 and lines[-1]["ratio"] > 0


def test_zipf_is_zipf() -> None:
    drawn = Counter(swap_bench.zipf(1000, 50_000, seed=1))
    assert max(drawn) < 1000
    harmonic = sum(1 / i for i in range(1, 1001))
    for number in (0, 1, 9):
        assert drawn[number] / 50_000 == pytest.approx(1 / (number + 1) / harmonic, rel=0.1)


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
