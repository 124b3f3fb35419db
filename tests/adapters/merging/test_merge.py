from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex_adapters.errors import InvalidAdapter, StartupError
from adaplex_adapters.merging.merge import merge_adapter, merged_weight
from adaplex_adapters.merging.plan import plan_merge
from adaplex_adapters.reader import read_unfitted
from adaplex_adapters.spec import Adapter, AdapterSpec, LoraModule

SPEC = AdapterSpec("0" * 64, "lora", 1, ("a",), 0, 0, "tiny")


class DictSource:
    """A WeightSource over tensors in memory that counts what was read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.reads: list[str] = []

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        return self._tensors[name]


def lora(out: int, inner: int, rank: int = 2, scaling: float = 0.5) -> LoraModule:
    return LoraModule(torch.randn(rank, inner), torch.randn(out, rank), scaling)


def tiny_model(attention_bias: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        attention_bias=attention_bias,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["k_proj", "v_proj", "up_proj"],
        "rank_pattern": {"k_proj": 3, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"v_proj": 1},
    },
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("attention_bias", [False, True])
def test_logits_are_those_of_base_and_adapter_in_peft(tmp_path: Path, settings: str, attention_bias: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = tiny_model(attention_bias)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "modeling_evil.py").write_text("raise SystemExit")
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **SETTINGS[settings]))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    peft.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(0, 96, (3, 17))
    with torch.no_grad():
        wanted, alone = peft(input_ids=ids).logits, None
        with peft.disable_adapter():
            alone = peft(input_ids=ids).logits
        adapter = read_unfitted(tmp_path / "adapter")
        report = merge_adapter(
            DictSource(tensors), adapter, tmp_path / "base", tmp_path / "out", torch.float32, shard_bytes=20_000
        )
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        found = merged(input_ids=ids).logits
    assert merged.dtype == torch.float32
    assert (found - wanted).abs().max() < 1e-4 < (alone - wanted).abs().max()
    assert report.merged == len(adapter.modules) and report.merged + report.passed == len(tensors)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json"} <= names
    assert "modeling_evil.py" not in names


def test_the_sum_is_taken_in_float32_whatever_is_stored() -> None:
    weight = torch.full((2, 2), 256.0, dtype=torch.bfloat16)
    module = LoraModule(torch.ones(1, 2, dtype=torch.float16), torch.ones(2, 1, dtype=torch.bfloat16), 0.25)
    assert torch.equal(merged_weight(weight, module), torch.full((2, 2), 256.25))


def test_the_config_loses_its_quantization_and_nothing_else(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"x": 1}, "torch_dtype": "float16", "rope_theta": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = DictSource({"a.weight": torch.zeros(3, 2), "ids": torch.arange(3)})
    adapter = Adapter(SPEC, {"a": lora(3, 2)})
    merge_adapter(source, adapter, tmp_path, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == {"model_type": "llama", "rope_theta": 7, "dtype": "bfloat16"}
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["a.weight"].dtype == torch.bfloat16 and torch.equal(tensors["ids"], torch.arange(3))


def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    source = DictSource({"a.weight": torch.zeros(3, 2), "b.weight": torch.zeros(3, 2)})
    torn = LoraModule(torch.zeros(2, 2), torch.zeros(3, 1), 1.0)
    adapter = Adapter(SPEC, {"a": lora(2, 3), "b": torn, "c": lora(3, 2)})
    with pytest.raises(InvalidAdapter) as caught:
        merge_adapter(source, adapter, tmp_path, tmp_path / "out")
    for said in ("a: the adapter is for a weight of [2, 3], the base's is [3, 2]", "b: lora_A", "c: the base has no"):
        assert said in caught.value.message
    assert source.reads == [] and not (tmp_path / "out").exists()
    with pytest.raises(StartupError, match=r"config\.json"):
        merge_adapter(source, Adapter(SPEC, {}), tmp_path / "nowhere", tmp_path / "out")


def test_the_plan_names_every_tensor_once_in_order() -> None:
    shapes = {"x": (1,), "a.weight": (3, 2), "a.bias": (3,)}
    steps = plan_merge(shapes, Adapter(SPEC, {"a": lora(3, 2)}))
    assert [(s.name, s.module is not None) for s in steps] == [("x", False), ("a.weight", True), ("a.bias", False)]


def test_a_source_that_breaks_leaves_no_result(tmp_path: Path) -> None:
    class Breaking(DictSource):
        def read(self, name: str) -> torch.Tensor:
            raise StartupError("the disk is gone")

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StartupError, match="disk is gone"):
        merge_adapter(Breaking({"a": torch.zeros(1)}), Adapter(SPEC, {}), tmp_path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
