"""PEFT's tests of mixed adapter batches over HTTP: nine concurrent requests, by turns of the base, the first and the
second adapter, each as if it were alone.

After class TestMixedAdapterBatches of tests/test_custom_models.py in the repository huggingface/peft. Where PEFT
refuses (DoRA beside others), the case here is that it is served. Convolutions, attention modules and training have no
counterpart in a server of language models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from running_server import RunningServer, running_server

from support.tiny_base import make_base, make_tokenizer

PROMPTS = torch.arange(90).view(9, 10)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "same": ({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"]}),
    "different-ranks": ({"target_modules": LINEARS}, {"target_modules": LINEARS, "r": 16, "lora_alpha": 3}),
    "different-targets": ({"target_modules": ["q_proj"]}, {"target_modules": ["down_proj"]}),
    "overlapping-targets": ({"target_modules": ["v_proj"]}, {"target_modules": ["v_proj", "o_proj"]}),
    "embedding": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"], "r": 16},
    ),
    "modules-to-save": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "embedding-and-modules-to-save": (
        {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj"]},
    ),
    "dora-and-lora": ({"target_modules": LINEARS, "use_dora": True}, {"target_modules": LINEARS}),
    "dora-and-dora": ({"target_modules": ["q_proj"], "use_dora": True}, {"target_modules": LINEARS, "use_dora": True}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return make_base(folder, make_tokenizer(), tied=False, spread=0.15, dtype=torch.float32)


@pytest.fixture(scope="module")
def mixed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    options = ("--base", str(base), "--served-name", "tiny", "--quantize", "none", "--dtype", "float32")
    with running_server(tmp_path_factory.mktemp("mixed"), *options) as running:
        yield running


def peft_model(base: Path, *recipes: dict[str, Any]) -> Any:
    """A model with "adapter0", "adapter1", ... of random weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    configs = [LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **recipe) for recipe in recipes]
    peft = get_peft_model(model, configs[0], "adapter0")
    for number, config in enumerate(configs[1:], 1):
        peft.add_adapter(f"adapter{number}", config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return peft.eval()


def upload(server: RunningServer, name: str, folder: Path) -> httpx.Response:
    files = [
        ("files", (one.name, one.read_bytes())) for one in folder.iterdir() if one.suffix in (".json", ".safetensors")
    ]
    return httpx.post(f"{server.http}/v1/adapters", data={"name": name}, files=files, timeout=60)


async def ask(server: RunningServer, models: list[str]) -> list[httpx.Response]:
    """Each prompt of its model, all at once: its tokens' log-probabilities and one token more."""
    async with httpx.AsyncClient(timeout=60) as client:
        bodies = [
            {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
            for model, prompt in zip(models, PROMPTS.tolist(), strict=True)
        ]
        return await asyncio.gather(*(client.post(f"{server.http}/v1/completions", json=body) for body in bodies))


@torch.no_grad()
def alone(peft: Any, adapter: str | None) -> torch.Tensor:
    """[9, 10] float32: the log-probability of each prompt's tokens but the first, and of the best token after them."""
    if adapter is None:
        with peft.disable_adapter():
            scores = peft(input_ids=PROMPTS).logits.log_softmax(-1)
    else:
        peft.set_adapter(adapter)
        scores = peft(input_ids=PROMPTS).logits.log_softmax(-1)
    told = scores[:, :-1].gather(-1, PROMPTS[:, 1:, None])[..., 0]
    return torch.cat([told, scores[:, -1].max(-1, keepdim=True).values], 1)


def logprobs_of(answer: httpx.Response) -> torch.Tensor:
    assert answer.status_code == 200, answer.text
    first, *others = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert first is None
    return torch.tensor(others)


@pytest.mark.parametrize("case", CASES)
def test_each_request_is_as_if_alone(case: str, mixed: RunningServer, base: Path, tmp_path: Path) -> None:
    peft = peft_model(base, *CASES[case])
    peft.save_pretrained(tmp_path)
    names = [f"{case}-{number}" for number in range(2)]
    for number, name in enumerate(names):
        assert upload(mixed, name, tmp_path / f"adapter{number}").status_code == 201
    models = ["tiny", *names] * 3
    answers = asyncio.run(ask(mixed, models))
    expected = [alone(peft, adapter) for adapter in (None, "adapter0", "adapter1")]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(expected[one], expected[other], atol=1e-2)
    for row, answer in enumerate(answers):
        torch.testing.assert_close(logprobs_of(answer), expected[row % 3][row], atol=1e-4, rtol=1e-4)


def test_a_wrong_name_fails_alone(mixed: RunningServer, base: Path, tmp_path: Path) -> None:
    peft = peft_model(base, {"target_modules": ["q_proj"]})
    peft.save_pretrained(tmp_path)
    assert upload(mixed, "right", tmp_path / "adapter0").status_code == 201
    answers = asyncio.run(ask(mixed, ["right"] * 4 + ["does-not-exist"] * 3 + ["tiny"] * 2))
    expected = [alone(peft, "adapter0")] * 4 + [None] * 3 + [alone(peft, None)] * 2
    for row, (answer, scores) in enumerate(zip(answers, expected, strict=True)):
        if scores is None:
            assert answer.status_code == 404 and "does-not-exist" in answer.json()["error"]["message"]
        else:
            torch.testing.assert_close(logprobs_of(answer), scores[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["LNTuningConfig", "RoadConfig"])
def test_a_kind_that_is_not_served_is_refused_by_its_name(
    kind: str, mixed: RunningServer, base: Path, tmp_path: Path
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    config = getattr(peft, kind)(
        task_type="CAUSAL_LM", target_modules=["input_layernorm" if "LN" in kind else "q_proj"]
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    answer = upload(mixed, "unknown-kind", tmp_path)
    assert answer.status_code == 400
    assert config.peft_type.value in answer.json()["error"]["message"]
    assert httpx.get(f"{mixed.http}/v1/adapters/unknown-kind").status_code == 404
