"""The service over the real engine process and a tiny base.

The same answers as transformers and PEFT give, before and after a kill.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

from adaplex_adapters.errors import Unavailable
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.service.limits import SamplingRequest
from adaplex_server.service.service import Service
from adaplex_server.service.settings import ENGINE_COMMAND
from adaplex_server.vocabulary import Delta, GenerateRequest

PROMPT = "The same answer"
TOKENS = 12


def request(service: Service, model: str, tokens: int = TOKENS) -> GenerateRequest:
    wish = SamplingRequest(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return service.request(model=model, prompt=service.text.encode(PROMPT), sampling=wish)


async def tokens_of(service: Service, model: str) -> list[int]:
    items = [item async for item in service.generate(request(service, model))]
    return [token for item in items if isinstance(item, Delta) for token in item.token_ids]


def oracle(base: Path, adapter: Path | None, prompt: list[int]) -> list[int]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    ids = torch.tensor([prompt])
    for _ in range(TOKENS):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


async def test_answers_are_pefts_and_survive_a_killed_engine(
    running: Callable[..., Awaitable[Service]], tiny_base: Path, adapters: tuple[Path, ...], tmp_path: Path
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
    for number in range(2):
        await service.registry.load_folder(f"a{number}", adapters[number])
    names = ["tiny", "a0", "a1", "a0", "tiny"]
    prompt = service.text.encode(PROMPT)
    expected = {
        "tiny": oracle(tiny_base, None, prompt),
        "a0": oracle(tiny_base, adapters[0], prompt),
        "a1": oracle(tiny_base, adapters[1], prompt),
    }
    assert len(set(map(tuple, expected.values()))) == 3
    answers = await asyncio.gather(*(tokens_of(service, name) for name in names))
    assert answers == [expected[name] for name in names]

    items = service.generate(request(service, "a1", tokens=400))
    await anext(items)
    engine_info = service.info().engine
    assert engine_info
    os.kill(engine_info.pid, signal.SIGKILL)
    with pytest.raises(Unavailable):
        async for _ in items:
            pass
    async with asyncio.timeout(120):
        while not service.info().ready:
            await asyncio.sleep(0.05)
    assert await asyncio.gather(*(tokens_of(service, name) for name in names)) == answers
