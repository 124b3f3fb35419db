"""The second start takes the weights from the cache, and a checkpoint that changed is read again."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from adaplex_server.engine import base_source
from adaplex_server.engine.base_source import obtain_base
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.model.base import Base
from adaplex_server.model.config import read_config
from adaplex_server.model.weight_cache import WeightCache, weight_key
from support.tiny_models import CPU, save_tiny


class Start:
    """Starts with one checkpoint, one after another, and what they told."""

    def __init__(self, folder: Path, cache: Path | None) -> None:
        self.folder = folder
        self.settings = EngineSettings(
            base=str(folder),
            store="",
            base_name="b",
            quantize="none",
            weight_cache=None if cache is None else str(cache),
        )
        self.told: list[str] = []

    def __call__(self) -> Base:
        config = read_config(self.folder)
        base, keep = obtain_base(
            self.settings, config, torch.float32, CPU, lambda text, fraction: self.told.append(text)
        )
        keep()
        for thread in threading.enumerate():
            if thread.name == "weight-cache":
                thread.join()
        return base


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Start:
    """As on a GPU."""

    def cache(settings: EngineSettings, config, dtype: torch.dtype, device: torch.device) -> WeightCache:  # noqa: ANN001
        key = weight_key(Path(settings.base), config, (str(dtype),), device)
        return WeightCache(Path(str(settings.weight_cache)), key)

    monkeypatch.setattr(base_source, "_cache", cache)
    save_tiny(tmp_path / "base", "llama3")
    return Start(tmp_path / "base", tmp_path / "weights")


def head(base: Base) -> torch.Tensor:
    return base.layers[2].linears["down"].dequantized()


def test_the_second_start_reads_no_checkpoint(cached: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached()
    monkeypatch.setattr(base_source, "load_base", lambda *a, **k: pytest.fail("the checkpoint is read again"))
    assert torch.equal(head(cached()), head(first))


def test_a_changed_checkpoint_is_read(cached: Start) -> None:
    first = cached()
    save_tiny(cached.folder, "llama3", seed=5)
    second = cached()
    assert not torch.equal(head(second), head(first)) and torch.equal(head(cached()), head(second))


@pytest.mark.parametrize("wanted", [True, False])
def test_a_cpu_keeps_nothing(tmp_path: Path, wanted: bool) -> None:
    save_tiny(tmp_path / "base", "llama3")
    Start(tmp_path / "base", tmp_path / "weights" if wanted else None)()
    assert not (tmp_path / "weights").exists()
