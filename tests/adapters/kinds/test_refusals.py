"""What each kind refuses, and that the refusal says which kind, field or tensor it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.describe import check_adapter
from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.kinds.registry import KINDS, reader_of
from adaplex_adapters.reader import read_adapter

Tensors = dict[str, torch.Tensor]
LAYER = "base_model.model.model.layers.0."
Q0, DOWN0 = f"{LAYER}self_attn.q_proj.", f"{LAYER}mlp.down_proj."


@pytest.fixture(scope="module")
def shape(tiny_llama: Any, full_shape: Any) -> BaseShape:
    return full_shape(tiny_llama())


def edit(folder: Path, fields: dict[str, Any], change: Callable[[Tensors], Any] | None = None) -> Path:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    if change is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def put(key: str, *shape: int) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.__setitem__(key, torch.ones(shape))


def drop(key: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.__delitem__(key)


CASES: list[tuple[str, dict[str, Any], Callable[[Tensors], Any] | None, str]] = [
    ("dora", {}, drop(f"{Q0}lora_magnitude_vector"), "q_proj has no lora_magnitude_vector"),
    ("dora", {"use_dora": False}, None, "does not say use_dora"),
    ("dora", {}, put(f"{Q0}lora_magnitude_vector", 31), r"magnitude of \[31\]; the base: \[32\]"),
    ("dora", {}, put(f"{Q0}lora_magnitude_vector", 32, 1), "must be a vector"),
    ("lora", {}, put(f"{Q0}lora_B.bias", 32), "lora_bias"),
    ("lora", {"bias": "all"}, put(f"{Q0}base_layer.bias", 32), "trained bias"),
    ("lora", {}, put(f"{LAYER}input_layernorm.weight", 32), "input_layernorm"),
    ("lora", {"modules_to_save": ["lm_head"]}, None, "its weight is missing"),
    ("lora", {"modules_to_save": ["q_proj"]}, None, "its weight is missing"),
    ("lora saved", {"modules_to_save": []}, put("base_model.model.lm_head.weight", 63, 32), r"copies lm_head .*\[63"),
    ("lora saved", {}, put("base_model.model.lm_head.weight", 64, 31), r"replaces lm_head .*\[64, 31\]"),
    (
        "lora",
        {"modules_to_save": ["input_layernorm"]},
        put(f"{LAYER}input_layernorm.weight", 32, 1),
        "only lm_head and model.embed_tokens can stand",
    ),
    ("lora embedding", {"ensure_weight_tying": True}, None, "ensure_weight_tying"),
    ("lora embedding", {}, drop("base_model.model.model.embed_tokens.lora_embedding_B"), "no lora_embedding_B"),
    ("lora", {"adaplex_kind": "dora"}, None, "adaplex_kind"),
    ("ia3", {}, put(f"{DOWN0}ia3_l", 48, 1), r"must be \[1, in\]"),
    ("ia3", {"feedforward_modules": []}, None, r"must be \[out, 1\]"),
    ("ia3", {"feedforward_modules": None}, None, "feedforward_modules"),
    ("ia3", {}, put(f"{DOWN0}ia3_l", 1, 47), "47 factors on its input; the base has 48"),
    ("ia3", {"layers_to_transform": [0]}, None, "PEFT would ignore it"),
    ("ia3", {"target_modules": ["down_proj"]}, None, "not targeted"),
    ("ia3", {"feedforward_modules": r"((.*)*)*!(?:(?:.?){9999}){9999}"}, None, "refused"),
    ("ia3", {}, put(f"{Q0}lora_A.weight", 4, 32), "part of a LoRA"),
    ("prompt_tuning", {"num_virtual_tokens": 6}, None, r"shape \[5, 32\].*\[6, 32\]"),
    ("prompt_tuning", {"num_virtual_tokens": 0}, None, "num_virtual_tokens=0"),
    ("prompt_tuning", {"token_dim": 16}, put("prompt_embeddings", 5, 16), "16 features; the base has 32"),
    ("prompt_tuning", {"num_transformer_submodules": 2}, None, "only decoders"),
    ("prompt_tuning", {"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
    ("prompt_tuning", {}, put("more", 1), "more would stay unused"),
    ("p_tuning", {"token_dim": None}, None, "token_dim"),
    ("prefix_tuning", {"num_layers": 3}, None, "prompt_embeddings has shape"),
    ("prefix_tuning", {"num_attention_heads": 3}, None, "do not divide"),
    ("prefix_tuning", {"num_attention_heads": 1}, None, "for 2 layers of 1 key heads of 16 features"),
    ("prefix_tuning", {"num_layers": None}, None, "has no num_layers"),
    ("vera", {}, drop("base_model.vera_A"), "save_projection"),
    ("vera", {"r": 5}, None, "gives it rank 5"),
    ("vera", {"r": "A" * 5000}, None, r"A{90,120}\.\.\.; a rank.*A{90,120}\.\.\.\.$"),
    ("vera", {}, put(f"{Q0}vera_lambda_d", 5), r"vera_lambda_d .* \[5\]"),
    ("loha", {"r": 17}, None, "rank 17"),
    ("loha", {}, put(f"{Q0}hada_t1", 2, 2), "hada_t1"),
    ("loha", {}, drop(f"{Q0}hada_w2_b"), "no hada_w2_b"),
    ("lokr", {}, drop(f"{Q0}lokr_w1"), "either lokr_w1"),
    ("lokr", {}, put(f"{Q0}lokr_w1", 64, 64), r"A \[128, 512\], B \[512, 128\]; the base"),
    ("adalora", {"init_r": 5}, None, r"must be \[5, in\]"),
    ("adalora", {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True]}}, None, r"must be \[1, in\]"),
    ("adalora", {"rank_pattern": {"x": 3}}, None, "rank_pattern"),
]


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("name", "fields", "change", "reason"), CASES, ids=range(len(CASES)))
def test_refuses(name: str, fields: dict[str, Any], change: Any, reason: str, save_kind: Any, shape: BaseShape) -> None:
    folder = edit(save_kind(name)[0], fields, change)
    with pytest.raises(InvalidAdapter, match=reason) as caught:
        read_adapter(folder, shape)
    assert caught.value.message.isascii() and len(caught.value.message) < 4000


def test_every_kind_of_peft_is_served_or_refused_by_name() -> None:
    from peft import PeftType

    for kind in PeftType:
        if kind.value in KINDS:
            assert reader_of({"peft_type": kind.value}) is KINDS[kind.value]
        else:
            with pytest.raises(InvalidAdapter, match=f"'{kind.value}', a kind that is not served"):
                reader_of({"peft_type": kind.value})
    for impossible in (None, 3, [], {}, "lora", "LORA "):
        with pytest.raises(InvalidAdapter, match="peft_type"):
            reader_of({"peft_type": impossible})


@pytest.mark.parametrize(
    "name", ["IA3", "LOHA", "LOKR", "VERA", "ADALORA", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"]
)
def test_every_field_of_peft_is_known(name: str) -> None:
    """What PEFT writes by default is accepted; a field that a newer one sets must be looked at."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from adaplex_adapters.automaton import WorkBudget
    from adaplex_adapters.kinds.reading import Source
    from adaplex_adapters.limits import ReadLimits

    config = PEFT_TYPE_TO_CONFIG_MAPPING[name]
    total = {"total_step": 5} if name == "ADALORA" else {}
    written = json.loads(json.dumps(config(**total).to_dict(), default=list))
    with pytest.raises(InvalidAdapter) as caught:
        KINDS[name](Source(written | {"x_new": 1}, {}, ReadLimits(), WorkBudget()))
    assert [problem for problem in caught.value.problems if "does not know" in problem] == [
        problem for problem in caught.value.problems if "x_new" in problem
    ]


def test_problems_of_all_files_are_told_at_once(save_kind: Any, shape: BaseShape) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{Q0}lora_A.weight"][0, 0] = float("nan")
        tensors["extra"] = torch.ones(1)
        del tensors[f"{DOWN0}lora_B.weight"]

    folder = edit(save_kind("lora")[0], {"use_qalora": True, "r": 0}, spoil)
    (folder / "weights.bin").write_bytes(b"")
    problems = "\n".join(check_adapter(folder, shape).problems)
    assert "weights.bin" in problems and "NaN" in problems
    (folder / "weights.bin").unlink()
    problems = "\n".join(check_adapter(folder, shape).problems)
    for word in ("QA-LoRA", "r=0", "extra", "NaN"):
        assert word in problems


def test_an_adalora_whose_ranks_were_cut(save_kind: Any, shape: BaseShape, tiny_llama: Any) -> None:
    from peft import PeftModel

    from support.adapter_reference import logits

    masks = {
        "model.layers.0.self_attn.q_proj.lora_E": [True, False, True, False],
        "model.layers.1.mlp.up_proj.lora_E": [False, False, False, False],
    }

    def cut(tensors: Tensors) -> None:
        for key, mask in masks.items():
            path = f"base_model.model.{key.removesuffix('.lora_E')}"
            kept = torch.tensor(mask)
            for part in ("lora_A", "lora_E"):
                tensors[f"{path}.{part}"] = tensors[f"{path}.{part}"][kept]
            tensors[f"{path}.lora_B"] = tensors[f"{path}.lora_B"][:, kept].contiguous()

    folder = edit(save_kind("adalora")[0], {"rank_pattern": masks}, cut)
    adapter = read_adapter(folder, shape)
    assert adapter.modules["model.layers.0.self_attn.q_proj"].a.shape[0] == 2 and len(adapter.modules) == 3
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(tiny_llama(), folder).eval()(ids).logits
    torch.testing.assert_close(logits(tiny_llama(), adapter, ids), expected, atol=1e-5, rtol=1e-5)
