"""Several adapters as one, against PEFT's weighted adapters and against their parts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.composition import Part, compose
from adaplex_adapters.errors import InvalidAdapter, InvalidRequest
from adaplex_adapters.identity import described
from adaplex_adapters.reader import read_adapter
from adaplex_adapters.spec import Adapter, Scale, draft
from adaplex_adapters.store import AdapterStore
from support.adapter_reference import logits

IDS = torch.arange(3, 15)[None]


@pytest.fixture
def loras(write_lora: Any, base: BaseShape) -> list[Path]:
    return [
        write_lora(("q_proj", "v_proj"), rank=4, seed=1, config={"lora_alpha": 2}),
        write_lora(("v_proj", "up_proj"), rank=3, seed=2, config={"lora_alpha": 1, "use_rslora": True}),
        write_lora(("q_proj",), rank=1, seed=3, dtype=torch.bfloat16),
    ]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 0.25), (1.0, 0.0, 3.0)])
def test_a_weighted_sum_is_pefts(
    weights: tuple[float, ...], loras: list[Path], base: BaseShape, tiny_llama: Any
) -> None:
    from peft import PeftModel

    names = ("a", "b", "c")
    adapted = PeftModel.from_pretrained(tiny_llama(), loras[0], adapter_name="a")
    for name, folder in zip(names[1:], loras[1:], strict=True):
        adapted.load_adapter(folder, adapter_name=name)
    adapted.add_weighted_adapter(list(names), list(weights), "sum", combination_type="cat")
    adapted.set_adapter("sum")
    whole = compose([Part(n, read_adapter(f, base), w) for n, f, w in zip(names, loras, weights, strict=True)])
    with torch.no_grad():
        expected = adapted.eval()(IDS).logits
    torch.testing.assert_close(logits(tiny_llama(), whole, IDS), expected, atol=1e-4, rtol=1e-4)
    assert whole.spec.rank == 7 and whole.spec.kind == "composition"


def soft(spec: Any) -> Adapter:
    return Adapter(replace(spec, virtual_tokens=3), soft_prompt=torch.randn(3, 32))


def test_a_soft_prompt_with_a_lora(loras: list[Path], base: BaseShape) -> None:
    lora = read_adapter(loras[0], base)
    prompt = soft(lora.spec)
    both = compose([Part("p", prompt), Part("l", lora)])
    assert both.soft_prompt is prompt.soft_prompt and both.modules == lora.modules
    assert both.spec.virtual_tokens == 3 and both.spec.rank == 4
    assert both.spec.revision not in (lora.spec.revision, compose([Part("p", prompt)]).spec.revision)


def test_one_alone_is_itself(loras: list[Path], base: BaseShape) -> None:
    lora = read_adapter(loras[0], base)
    assert compose([Part("l", lora)]).spec.revision == lora.spec.revision


def test_what_has_no_sum_is_refused(loras: list[Path], base: BaseShape) -> None:
    lora = read_adapter(loras[0], base)
    prompt = soft(lora.spec)
    path, module = next(iter(lora.modules.items()))
    dora = replace(lora, modules={path: replace(module, magnitude=torch.ones(module.b.shape[0]))})
    for parts, reason in (
        ([Part("p", prompt), Part("r", prompt)], "place before the prompt"),
        ([Part("p", prompt, 0.5)], "no weight"),
        ([Part("l", lora), Part("d", dora)], path),
        ([Part("d", dora), Part("l", lora)], path),
        ([Part("d", dora, 2.0)], "no weight"),
        ([Part("l", lora, float("nan"))], "nan"),
    ):
        with pytest.raises(InvalidRequest, match=reason):
            compose(parts)


def test_different_kinds_are_kept_and_read_as_the_same(loras: list[Path], base: BaseShape, tmp_path: Path) -> None:
    lora, store = read_adapter(loras[1], base), AdapterStore(tmp_path / "store")
    path, module = next(iter(read_adapter(loras[0], base).modules.items()))
    dora = replace(module, magnitude=torch.rand(module.b.shape[0]) + 0.5)
    for number, others in enumerate(
        (
            [soft(lora.spec)],
            [Adapter(draft("ia3", ""), scales={"model.layers.0.self_attn.k_proj": Scale(torch.rand(16), "output")})],
            [described(Adapter(draft("dora", ""), modules={path: dora}))],
        )
    ):
        whole = compose([Part("l", lora, 0.5), *(Part(str(number), one) for one in others)])
        again = store.read(store.commit(whole), base)
        assert again.spec.revision == whole.spec.revision
        assert (again.spec.rank, again.spec.virtual_tokens) == (whole.spec.rank, whole.spec.virtual_tokens)
        assert again.modules.keys() == whole.modules.keys()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "1 to 6 parts"),
        ({"parts": []}, "1 to 6 parts"),
        ({"parts": [3]}, "part 0 .* is not the config"),
        ({"parts": [{"peft_type": "COMPOSITION", "parts": []}]}, "part 0 .* is not the config"),
        ({"parts": [{"peft_type": "LORA"}], "alpha": 1}, "nothing else"),
    ],
)
def test_a_broken_composition_is_refused(fields: dict[str, Any], told: str, tmp_path: Path, base: BaseShape) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "COMPOSITION", **fields}))
    save_file({"0.x": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapter, match=told):
        read_adapter(tmp_path, base)
