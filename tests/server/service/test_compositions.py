"""Adapters that are used together: made once, kept while they may be asked for, gone with their parts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adaplex_adapters.composition import Part, compose
from adaplex_adapters.errors import AdaplexError, InvalidRequest, ModelNotFound
from adaplex_adapters.reader import read_adapter
from adaplex_server.caller import Caller
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.model.config import read_config
from adaplex_server.model.families import base_shape
from adaplex_server.service import compositions
from adaplex_server.service.composed_name import NamedPart
from adaplex_server.service.limits import SamplingRequest
from adaplex_server.service.service import Service
from adaplex_server.service.settings import ENGINE_COMMAND
from adaplex_server.vocabulary import Delta
from support.adapter_reference import logits

Starter = Callable[..., Awaitable[Service]]


def stream(service: Service, model: str, tokens: int = 64) -> Any:
    return service.generate(service.request(model=model, prompt=[5], sampling=SamplingRequest(max_tokens=tokens)))


async def stamp(service: Service, model: str) -> str:
    """The revision that answers, from the answer's own text."""
    async with aclosing(stream(service, model)) as items:
        return "".join([item.text async for item in items if isinstance(item, Delta)])


def stored(service: Service) -> set[str]:
    return {folder.name for folder in Path(service.settings.engine.store, "revisions").iterdir()}


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def revision_of(base: Path, *parts: tuple[Path, float]) -> str:
    shape = base_shape(read_config(base))
    return compose([Part("x", read_adapter(folder, shape), weight) for folder, weight in parts]).spec.revision


@pytest.fixture
async def loaded(service: Service, adapters: tuple[Path, ...]) -> Service:
    for name, folder in zip("abc", adapters, strict=True):
        await service.registry.load_folder(name, folder)
    return service


async def test_a_sum_is_served_as_a_revision_of_its_own(
    loaded: Service, adapters: tuple[Path, ...], tiny_base: Path
) -> None:
    a, b, _ = adapters
    assert await stamp(loaded, "a+b") == revision_of(tiny_base, (a, 1), (b, 1))
    assert await stamp(loaded, "a*0.7+b*-2") == revision_of(tiny_base, (a, 0.7), (b, -2))
    assert await stamp(loaded, "a*1") == loaded.registry.resolve("a")
    assert [one.name for one in loaded.registry.list()] == ["a", "b", "c"]


async def test_a_crowd_makes_it_once(
    running: Starter, adapters: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    service = await running()
    for name, folder in zip("ab", adapters[:2], strict=True):
        await service.registry.load_folder(name, folder)
    answers = await asyncio.gather(*(stamp(service, "a+b") for _ in range(5)))
    assert len(set(answers)) == 1
    assert (tmp_path / "log").read_text().count(f"LoadAdapter {answers[0]}") == 1


async def test_who_leaves_does_not_leave_half_of_it(loaded: Service) -> None:
    first = asyncio.create_task(stamp(loaded, "a+b"))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert await stamp(loaded, "a+b")


async def test_rows_keep_what_they_began_with_when_a_part_is_loaded_again(
    loaded: Service, adapters: tuple[Path, ...], tiny_base: Path
) -> None:
    a, b, c = adapters
    old, new = revision_of(tiny_base, (a, 1), (b, 1)), revision_of(tiny_base, (a, 1), (c, 1))
    items = stream(loaded, "a+b", 300)
    text = (await anext(items)).text
    await loaded.registry.load_folder("b", c)
    assert await stamp(loaded, "a+b") == new
    assert old in stored(loaded)
    text += "".join([item.text async for item in items if isinstance(item, Delta)])
    assert text.count(old) == 300 // len(text.split(".")[0] + ".") and new not in text
    await eventually(lambda: old not in stored(loaded))
    assert new in stored(loaded)


async def test_it_goes_with_a_part(loaded: Service) -> None:
    made = await stamp(loaded, "a+b")
    await loaded.registry.unload("b")
    await eventually(lambda: made not in stored(loaded))
    with pytest.raises(ModelNotFound, match="'b'"):
        await stamp(loaded, "a+b")


async def test_it_stays_while_another_name_has_the_same_part(loaded: Service, adapters: tuple[Path, ...]) -> None:
    await loaded.registry.load_folder("twin", adapters[1])
    made = await stamp(loaded, "a+b")
    await loaded.registry.unload("b")
    assert made in stored(loaded) and await stamp(loaded, "a+twin") == made


async def test_unused_ones_are_bounded(loaded: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compositions, "MAX_UNUSED", 2)
    made = [await stamp(loaded, f"a*0.{number}") for number in range(1, 5)]
    await eventually(lambda: not {made[0], made[1]} & stored(loaded))
    assert {made[2], made[3]} <= stored(loaded)
    assert await stamp(loaded, "a*0.1") == made[0]


async def test_one_that_nobody_asks_for_goes_after_a_while(loaded: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compositions, "IDLE_SECONDS", 0.2)
    made = await stamp(loaded, "a+b")
    await eventually(lambda: made not in stored(loaded))


@pytest.mark.parametrize(
    ("model", "error", "reason"),
    [
        ("a+nobody", ModelNotFound, "'nobody' does not exist"),
        ("a+tiny", InvalidRequest, "'tiny' is the base"),
        ("base+a", InvalidRequest, "'base' is the base"),
        ("a*x", InvalidRequest, "decimal number"),
        ("a+", InvalidRequest, "must not be empty"),
    ],
)
async def test_errors_come_before_the_first_token(
    model: str, error: type[AdaplexError], reason: str, loaded: Service
) -> None:
    with pytest.raises(error, match=reason):
        stream(loaded, model)


async def test_one_that_the_engine_refuses_leaves_nothing(
    running: Starter, adapters: tuple[Path, ...], settings: Any
) -> None:
    service = await running(engine=msgspec.structs.replace(settings.engine, max_rank=7))
    for name, folder in zip("ab", adapters[:2], strict=True):
        await service.registry.load_folder(name, folder)
    before = stored(service)
    with pytest.raises(InvalidRequest, match="rank 8; this server serves 7"):
        await stamp(service, "a+b")
    assert stored(service) == before


async def test_a_key_needs_every_part_in_its_scope(loaded: Service) -> None:
    wish = SamplingRequest(max_tokens=1)
    caller = Caller("k", "k", models=("a*",))
    loaded.request(model="a*2", prompt=[5], sampling=wish, caller=caller)
    with pytest.raises(ModelNotFound, match="has no access"):
        loaded.request(model="a+b", prompt=[5], sampling=wish, caller=caller)


async def test_all_compositions_have_one_label(loaded: Service) -> None:
    await stamp(loaded, "a+b")
    await stamp(loaded, "a*0.5")
    text = loaded.metrics.exposition()[0].decode()
    assert 'adaplex_requests_total{adapter="composition",reason="length"} 2.0' in text and "a+b" not in text


async def test_a_named_one_is_durable_and_stays_what_it_is(
    running: Starter, adapters: tuple[Path, ...], tiny_base: Path
) -> None:
    service = await running()
    a, b, c = adapters
    parts = {name: await service.registry.load_folder(name, folder) for name, folder in zip("ab", (a, b), strict=True)}
    info = await service.registry.compose("both", [NamedPart("a", 0.7), NamedPart("b")])
    assert info.revision == revision_of(tiny_base, (a, 0.7), (b, 1)) == await stamp(service, "both")
    assert (info.source, info.kind, info.rank) == ("composition", "composition", 8)
    assert [(one.name, one.weight, one.revision) for one in info.parts] == [
        ("a", 0.7, parts["a"].revision),
        ("b", 1.0, parts["b"].revision),
    ]
    await service.registry.load_folder("b", c)
    await service.registry.unload("a")
    await service.close()
    again = await running()
    assert replace(again.registry.describe("both"), state=info.state) == info
    assert await stamp(again, "both") == info.revision
    with pytest.raises(ModelNotFound, match="'a'"):
        await again.registry.compose("more", [NamedPart("a")])


PROMPT = "The same answer"
TOKENS = 12


def greedy(logits: Callable[[torch.Tensor], torch.Tensor], prompt: list[int]) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities. logits: of ids [1, n], [1, any, vocabulary]."""
    tokens, logprobs = list(prompt), []
    for _ in range(TOKENS):
        with torch.no_grad():
            scores = logits(torch.tensor([tokens]))[0, -1].log_softmax(-1)
        tokens.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    return tokens[len(prompt) :], logprobs


def weighted(base: Path, folders: list[Path], weights: list[float]) -> Any:
    """PEFT's own weighted adapter."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        peft.load_adapter(folder, adapter_name=str(number))
    peft.add_weighted_adapter([str(n) for n in range(len(folders))], weights, "sum", combination_type="cat")
    peft.set_adapter("sum")
    return peft.eval()


def logits_of(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: model(input_ids=ids).logits


def write_soft_prompt(base: Path, folder: Path) -> Path:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    peft.save_pretrained(folder)
    return folder


async def test_answers_are_those_of_pefts_weighted_adapter(
    running: Starter, tiny_base: Path, adapters: tuple[Path, ...], tmp_path: Path
) -> None:
    engine = EngineSettings(
        base=str(tiny_base),
        store=str(tmp_path / "adapters"),
        base_name="tiny",
        quantize="none",
        dtype="float32",
        device="cpu",
        max_rows=8,
        kv_bytes=8 << 20,
        adapter_bytes=4 << 20,
        threads=1,
    )
    service = await running(engine=engine, engine_command=ENGINE_COMMAND)
    for name, folder in zip("ab", adapters[:2], strict=True):
        await service.registry.load_folder(name, folder)
    soft = write_soft_prompt(tiny_base, tmp_path / "soft")
    await service.registry.load_folder("soft", soft)
    await service.registry.compose("named", [NamedPart("a", 2.0), NamedPart("b", -0.5)])
    prompt = service.text.encode(PROMPT)
    wish = SamplingRequest(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)

    async def answer(model: str) -> tuple[list[int], list[float]]:
        items = service.generate(service.request(model=model, prompt=prompt, sampling=wish))
        scores = [one async for item in items if isinstance(item, Delta) for one in item.logprobs]
        return [one.token_id for one in scores], [one.logprob for one in scores]

    sums = {"a+b": [1.0, 1.0], "a*0.7+b*0.3": [0.7, 0.3], "named": [2.0, -0.5]}
    answers = await asyncio.gather(*(answer(model) for model in (*sums, "soft+a*2", "soft")))
    shape = base_shape(read_config(tiny_base))
    both = compose([Part("s", read_adapter(soft, shape)), Part("a", read_adapter(adapters[0], shape), 2.0)])
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    wanted = [greedy(logits_of(weighted(tiny_base, list(adapters[:2]), weights)), prompt) for weights in sums.values()]
    wanted.append(greedy(lambda ids: logits(plain, both, ids), prompt))
    wanted.append(greedy(logits_of(PeftModel.from_pretrained(plain, soft).eval()), prompt))
    for (tokens, scores), (best, expected) in zip(answers, wanted, strict=True):
        assert tokens == best
        assert scores == pytest.approx(expected, abs=1e-3)
    assert len({tuple(tokens) for tokens, _ in answers}) == 5
