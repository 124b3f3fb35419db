"""The loss of a text on a base in each format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.bases.quality import FORMATS, measure
from adaplex_server.cli.main import app
from adaplex_server.model.config import read_config
from support.tiny_base import make_base, make_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), make_tokenizer())


def test_the_dense_loss_is_that_of_transformers(base: Path) -> None:
    ids = torch.randint(3, 200, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    found = measure(base, read_config(base), "none", ids, 20, torch.float32, CPU)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    pieces = [torch.tensor([ids[begin : begin + 20]]) for begin in range(0, 50, 20)]
    with torch.no_grad():
        losses = [float(model(piece, labels=piece).loss) * (piece.shape[1] - 1) for piece in pieces]
    assert found.tokens == 47 and found.loss == pytest.approx(sum(losses) / 47, abs=1e-5)


def test_more_bits_are_nearer_to_the_dense_base(base: Path) -> None:
    ids = torch.randint(3, 200, (128,), generator=torch.Generator().manual_seed(1)).tolist()
    found = {name: measure(base, read_config(base), name, ids, 64, torch.float32, CPU) for name in FORMATS}
    away = {name: abs(one.loss - found["none"].loss) for name, one in found.items()}
    assert max(away["int8"], away["int8-absmax"], away["int8-zeropoint"]) < min(away["nf4"], away["fp4"])
    assert found["int8"].linear_bytes < 0.3 * found["none"].linear_bytes


def test_a_text_of_one_token_is_refused(base: Path) -> None:
    with pytest.raises(InvalidRequest, match="nothing to predict"):
        measure(base, read_config(base), "none", [5], 64, torch.float32, CPU)


def test_the_command(base: Path) -> None:
    arguments = ["bases", "quality", str(base), "--format", "nf4-double", "--tokens", "40", "--device", "cpu"]
    assert "nf4-double" in CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert found["tokens"] == 39 and found["perplexity"] > 1
