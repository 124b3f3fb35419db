from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from adaplex_adapters.catalogue import Catalogue
from adaplex_adapters.errors import Conflict, NotFound
from adaplex_adapters.reader import read_unfitted
from adaplex_adapters.store import AdapterStore
from adaplex_server.cli.demo import demo_adapters
from adaplex_server.cli.merge import find_adapter, merge_command
from support.in_float32 import in_float32
from support.tiny_base import make_base, make_tokenizer


def load_nf4(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense base, the same as bitsandbytes saves it in NF4, and an adapter with random weights."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("merge")
    dense = make_base(root / "dense" / "tiny", make_tokenizer())
    quantized = load_nf4(dense)
    quantized.save_pretrained(root / "nf4" / "tiny")
    make_tokenizer().save_pretrained(root / "nf4" / "tiny")
    model = get_peft_model(in_float32(quantized), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    model.save_pretrained(root / "adapter")
    return {"dense": dense, "nf4": root / "nf4" / "tiny", "adapter": root / "adapter"}


def run(*arguments: object) -> Any:
    application = typer.Typer()
    application.command()(merge_command)
    result = CliRunner().invoke(application, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("form", ["dense", "nf4"])
def test_the_merged_model_is_the_quantized_base_with_the_adapter(
    folders: dict[str, Path], tmp_path: Path, form: str
) -> None:
    """Also from a dense checkpoint: it is served in NF4, so its NF4 values are merged."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    peft = PeftModel.from_pretrained(in_float32(load_nf4(folders["dense"])), str(folders["adapter"])).eval()
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.15)):
        out = tmp_path / dtype
        run("x", "--adapter", folders["adapter"], "--base", folders[form], "--out", out, "--dtype", dtype)
        merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert str(merged.dtype) == f"torch.{dtype}" and not hasattr(merged.config, "quantization_config")
        ids = torch.randint(3, 200, (4, 30), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted, found = peft(input_ids=ids).logits, merged(input_ids=ids).logits.float()
        assert (found - wanted).abs().max() < tolerance
        assert AutoTokenizer.from_pretrained(out).chat_template == make_tokenizer().chat_template


def test_a_dense_base_served_as_it_is_is_merged_as_it_is(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    common = ("x", "--adapter", folders["adapter"], "--base", folders["dense"], "--dtype", "float32")
    run(*common, "--out", tmp_path / "exact", "--quantize", "none")
    run(*common, "--out", tmp_path / "rounded")
    name = "model.layers.0.mlp.up_proj.weight"
    exact, rounded = (load_file(tmp_path / n / "model.safetensors")[name] for n in ("exact", "rounded"))
    adapter = read_unfitted(folders["adapter"]).modules[name.removesuffix(".weight")]
    dense = load_file(folders["dense"] / "model.safetensors")[name].float()
    torch.testing.assert_close(exact, dense + adapter.scaling * (adapter.b @ adapter.a))
    assert not torch.allclose(exact, rounded, atol=1e-3)


def test_names_are_found_in_the_catalogue_also_while_a_server_holds_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    adapter = read_unfitted(folders["adapter"])
    AdapterStore(tmp_path / "adapters").commit(adapter)
    catalogue = Catalogue(tmp_path / "catalogue.sqlite3")
    try:
        catalogue.put("mine", adapter.spec, "upload")
        found = read_unfitted(find_adapter("mine", tmp_path))
    finally:
        catalogue.close()
    assert found.spec.revision == adapter.spec.revision
    for name, folder in demo_adapters().items():
        assert find_adapter(name, tmp_path / "empty") == folder
    with pytest.raises(NotFound, match=r"'other' \(there are: .*mine"):
        find_adapter("other", tmp_path)
    assert not (tmp_path / "empty").exists()


def test_nothing_is_overwritten(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Conflict, match="exists already"):
        run("x", "--adapter", folders["adapter"], "--base", folders["nf4"], "--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
