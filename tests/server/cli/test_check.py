"""`adaplex adapters check` on folders of several kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from adaplex_adapters.reader import read_unfitted
from adaplex_adapters.spec import Adapter
from adaplex_server.bases.locate import locate_base
from adaplex_server.cli.adapters import app
from adaplex_server.model.adapter_cost import device_bytes
from adaplex_server.model.adapter_pool import bytes_per_page
from adaplex_server.model.config import ModelConfig, read_config
from adaplex_server.model.kv_cache import KvCache
from support.bottleneck_folder import write_bottleneck
from support.tiny_models import save_tiny


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    save_tiny(folder, "llama3")
    return folder


def prompt_folder(folder: Path, tokens: int, width: int) -> Path:
    folder.mkdir()
    fields = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": tokens, "token_dim": width}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file({"prompt_embeddings": torch.ones(tokens, width)}, folder / "adapter_model.safetensors")
    return folder


def check(folder: Path, base: Path) -> tuple[str, Exception | None]:
    found = CliRunner().invoke(app, ["check", str(folder), "--base", str(base)])
    return found.output, found.exception


def test_a_soft_prompt(base: Path, tmp_path: Path) -> None:
    output, error = check(prompt_folder(tmp_path / "x", 7, 64), base)
    assert error is None
    assert "prompt_tuning, 7 virtual tokens" in output and "MB of a GPU" in output and "fits" in output


def test_every_problem_is_told(base: Path, tmp_path: Path) -> None:
    folder = write_bottleneck(tmp_path / "x", layers=3, hidden=64)
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields["config"] |= {"use_gating": True, "phm_layer": True}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    (folder / "old.bin").write_bytes(b"")
    (folder / "adapter.safetensors").write_bytes(b"12")
    output, error = check(folder, base)
    assert error is not None
    assert output.count("problem: ") == 2 and "old.bin" in output and "truncated" in output


def test_what_it_costs(base: Path, tmp_path: Path) -> None:
    config: ModelConfig = read_config(locate_base(str(base)).folder)
    adapter: Adapter = read_unfitted(prompt_folder(tmp_path / "x", 5, 64))
    token = KvCache.bytes_per_page(config.num_layers, 1, config.num_kv_heads, config.head_dim, torch.bfloat16)
    assert device_bytes(adapter, config, torch.bfloat16) == 5 * token
    adapter = read_unfitted(write_bottleneck(tmp_path / "y", layers=3, hidden=64))
    page = bytes_per_page(config, torch.float32)
    assert device_bytes(adapter, config, torch.float32) == (adapter.spec.bottleneck_size // 8 + 1) * page
