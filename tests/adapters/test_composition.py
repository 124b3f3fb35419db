"""Several adapters as one, against PEFT's weighted adapters and against their parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.composition import Part, compose
from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.reader import read_adapter
from adaplex_adapters.spec import Adapter
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
