"""Requests through a whole service, over a fake engine process whose answers name the revision that made them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from adaplex_adapters.errors import (
    AdaplexError,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PromptTooLong,
    StartupError,
    Unavailable,
)
from adaplex_server.caller import ANYONE, Caller
from adaplex_server.service.limits import SamplingRequest
from adaplex_server.service.service import Service
from adaplex_server.service.settings import ServiceSettings
from adaplex_server.vocabulary import Delta, Finish, GenerateRequest

ENDLESS = 90_000
"""Tokens of a row that would take minutes: it ends in time only when it is cancelled."""


def asked(
    service: Service, model: str = "tiny", prompt: str = "hi", deadline: float | None = None, **wish: Any
) -> GenerateRequest:
    sampling = SamplingRequest(**{"max_tokens": 20, "seed": 7, **wish})
    return service.request(model=model, prompt=service.text.encode(prompt), sampling=sampling, deadline=deadline)


async def answered(service: Service, request: GenerateRequest) -> tuple[list[str], list[Finish]]:
    """The text and the end of each choice; each choice must end exactly once, last."""
    texts, ends = [""] * request.n, [None] * request.n
    async with aclosing(service.generate(request)) as items:
        async for item in items:
            assert ends[item.index] is None
            if isinstance(item, Delta):
                texts[item.index] += item.text
            else:
                ends[item.index] = item
    assert None not in ends
    return texts, ends


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def rows(service: Service) -> int:
    return service._room.total


async def test_base_answers_under_its_names(service: Service) -> None:
    for name in ("tiny", "base"):
        texts, ends = await answered(service, asked(service, name))
        assert texts == ["base/7.base/7.base/7"[:20]]
        assert (ends[0].reason, ends[0].prompt_tokens, ends[0].completion_tokens) == ("length", 2, 20)


async def test_choices_have_seeds_of_their_own(service: Service) -> None:
    texts, ends = await answered(service, asked(service, n=3, max_tokens=7))
    assert texts == ["base/7.", "base/8.", "base/9."]
    assert [end.index for end in ends] == [0, 1, 2]


async def test_adapter_answers_with_its_own_revision(service: Service, adapters: tuple[Path, ...]) -> None:
    infos = [await service.registry.load_folder(f"a{i}", folder) for i, folder in enumerate(adapters)]
    results = await asyncio.gather(*(answered(service, asked(service, info.name, max_tokens=64)) for info in infos))
    assert [texts[0] for texts, _ in results] == [info.revision for info in infos]


async def test_stop_string_ends_row_and_is_not_sent(service: Service) -> None:
    request = asked(service, stop=["e/7", "zzz"], max_tokens=ENDLESS)
    texts, ends = await answered(service, request)
    assert (texts, ends[0].reason, ends[0].matched_stop) == (["bas"], "stop", "e/7")
    await eventually(lambda: rows(service) == 0)


async def test_stopped_choice_frees_its_row_while_others_go_on(service: Service) -> None:
    async with aclosing(service.generate(asked(service, stop=["/7"], n=2, max_tokens=ENDLESS))) as items:
        async for item in items:
            if isinstance(item, Finish):
                assert item.index == 0
                break
        await eventually(lambda: rows(service) == 1)
        assert (await anext(items)).index == 1


async def test_deltas_carry_the_tokens_of_their_text(service: Service) -> None:
    request = asked(service, stop=["7.basX"], max_tokens=40)
    tokens: list[int] = []
    async for item in service.generate(request):
        if isinstance(item, Delta):
            assert service.text.decode(item.token_ids) == item.text
            tokens += item.token_ids
    assert len(tokens) == 40


async def test_leaving_reader_cancels_at_once(service: Service) -> None:
    stream = service.generate(asked(service, max_tokens=ENDLESS, n=2))
    await anext(stream)
    assert rows(service) == 2
    await stream.aclose()
    await eventually(lambda: rows(service) == 0)
    assert b'adaplex_requests_total{adapter="tiny",reason="cancelled"} 1.0' in service.metrics.exposition()[0]


async def test_cancelled_task_cancels_rows(service: Service) -> None:
    task = asyncio.create_task(answered(service, asked(service, max_tokens=ENDLESS)))
    await eventually(lambda: rows(service) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: rows(service) == 0)


async def test_rows_are_of_whom_the_key_was_made_for(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    link, seen = service._engine.link(), []
    submit = link.submit
    monkeypatch.setattr(link, "submit", lambda message, row: (seen.append(message.tenant), submit(message, row)))
    for caller in (ANYONE, Caller("12ab", "team")):
        request = service.request(model="tiny", prompt=[5], sampling=SamplingRequest(max_tokens=1), caller=caller)
        await answered(service, request)
    assert seen == ["", "team"]


async def test_unknown_model_lists_what_there_is(service: Service, adapters: tuple[Path, ...]) -> None:
    await service.registry.load_folder("itn", adapters[0])
    for name in ("nope", "../x", "x" * 10_000, "ｔiny", "tiny\n"):
        with pytest.raises(ModelNotFound, match="tiny, itn"):
            asked(service, name)


async def test_bad_requests_are_refused_before_the_first_item(service: Service) -> None:
    good = asked(service)
    with pytest.raises(PromptTooLong, match="100000"):
        asked(service, prompt="x" * 100_000)
    with pytest.raises(InvalidRequest, match="empty"):
        asked(service, prompt="")
    for prompt in ((-1,), (10**6,)):
        request = GenerateRequest(request_id="x", model="tiny", prompt=prompt, sampling=good.sampling)
        with pytest.raises(InvalidRequest, match="token ids"):
            await anext(service.generate(request))


async def test_flood_is_refused_at_once_with_a_hint(service: Service) -> None:
    room = 4 + 8
    streams = [service.generate(asked(service, max_tokens=ENDLESS)) for _ in range(room)]
    await asyncio.gather(*map(anext, streams))
    with pytest.raises(Overloaded) as refused:
        await anext(service.generate(asked(service)))
    assert refused.value.retry_after and refused.value.retry_after >= 1
    with pytest.raises(Overloaded):
        service.check_room(model="tiny")
    with pytest.raises(InvalidRequest, match="12 rows"):
        await anext(service.generate(asked(service, n=13)))
    await asyncio.gather(*(stream.aclose() for stream in streams))
    await eventually(lambda: rows(service) == 0)
    await answered(service, asked(service))


async def test_slow_reader_loses_its_request_and_nobody_else(running: Callable[..., Awaitable[Service]]) -> None:
    service = await running(row_buffer=50)
    slow = service.generate(asked(service, max_tokens=ENDLESS))
    text = (await anext(slow)).text
    await asyncio.gather(*(answered(service, asked(service, max_tokens=200)) for _ in range(2)))
    with pytest.raises(Overloaded, match="too slowly"):
        async for item in slow:
            text += item.text
    assert 50 <= len(text) < 60
    await eventually(lambda: rows(service) == 0)


async def test_deadline_is_kept_even_if_the_engine_says_nothing(
    running: Callable[..., Awaitable[Service]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MUTE", "1")
    monkeypatch.setattr("adaplex_server.service.answer.DEADLINE_GRACE", 0.05)
    service = await running()
    with pytest.raises(DeadlineExceeded):
        await answered(service, asked(service, deadline=0.05))


# ---- the engine is lost ----------------------------------------------------------------------------------------------


async def test_killed_engine_ends_every_row_once_and_comes_back(service: Service, adapters: tuple[Path, ...]) -> None:
    info = await service.registry.load_folder("a", adapters[0])
    streams = [service.generate(asked(service, name, max_tokens=ENDLESS)) for name in ("tiny", "a", "a")]
    await asyncio.gather(*map(anext, streams))
    os.kill(service.info().engine.pid, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(Unavailable) as lost:
            async for _ in stream:
                pass
        assert lost.value.retry_after
    assert not service.info().ready
    with pytest.raises(Unavailable):
        await anext(service.generate(asked(service)))
    await eventually(lambda: service.info().ready)
    assert service.info().restarts == 1
    assert service.registry.describe("a").state == "ready"
    texts, _ = await answered(service, asked(service, "a", max_tokens=64))
    assert texts == [info.revision]
    assert service.registry.describe("a").state == "resident"


async def test_load_under_way_fails_with_the_engine_and_leaves_nothing(
    service: Service, adapters: tuple[Path, ...], settings: ServiceSettings
) -> None:
    os.kill(service.info().engine.pid, signal.SIGSTOP)
    load = asyncio.create_task(service.registry.load_folder("a", adapters[0]))
    await asyncio.sleep(0.2)
    os.kill(service.info().engine.pid, signal.SIGKILL)
    with pytest.raises(Unavailable):
        await load
    assert service.registry.list() == ()
    await eventually(lambda: not list(Path(settings.engine.store, "revisions").iterdir()))
    await eventually(lambda: service.info().ready)
    await service.registry.load_folder("a", adapters[0])


async def test_hanging_engine_is_killed_and_comes_back(running: Callable[..., Awaitable[Service]]) -> None:
    service = await running(stall_seconds=0.4)
    await asyncio.sleep(0.6)  # idle is not hanging
    assert service.info().restarts == 0
    os.kill(service.info().engine.pid, signal.SIGSTOP)
    with pytest.raises(Unavailable):
        await answered(service, asked(service))
    await eventually(lambda: service.info().ready)
    assert service.info().restarts == 1
    await answered(service, asked(service))


async def test_crash_loop_backs_off_and_says_why(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAKE_CRASH", "1")
    os.kill(service.info().engine.pid, signal.SIGKILL)
    await eventually(lambda: service.info().state == "failed")
    assert "exit code 3" in service.info().detail
    assert "crashing on purpose" in caplog.text
    monkeypatch.setenv("FAKE_FAIL", "no memory left")
    await eventually(lambda: "no memory left" in service.info().detail)
    assert service.info().state == "failed"
    monkeypatch.delenv("FAKE_FAIL")
    monkeypatch.delenv("FAKE_CRASH")
    await eventually(lambda: service.info().ready)
    await answered(service, asked(service))


async def test_engine_that_cannot_start_is_a_startup_error(
    settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "too little memory")
    service = Service(settings)
    with pytest.raises(StartupError, match="too little memory"):
        await service.start()
    assert service.info().state == "failed"
    await service.close()


async def test_second_service_on_one_folder_is_refused(service: Service, settings: ServiceSettings) -> None:
    second = Service(settings)
    with pytest.raises(StartupError, match="Another server"):
        await second.start()
    await second.close()
    await answered(service, asked(service))


# ---- the end ---------------------------------------------------------------------------------------------------------


async def test_drain_refuses_new_work_and_lets_running_work_finish(service: Service) -> None:
    running = asyncio.create_task(answered(service, asked(service, max_tokens=200)))
    await eventually(lambda: rows(service) == 1)
    request = asked(service)
    drained = asyncio.create_task(service.drain(10))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable) as refused:
        await anext(service.generate(request))
    assert refused.value.retry_after
    _, ends = await running
    assert ends[0].reason == "length"
    await drained


async def test_drain_ends_what_is_not_done_in_time(service: Service) -> None:
    running = asyncio.create_task(answered(service, asked(service, max_tokens=ENDLESS)))
    await eventually(lambda: rows(service) == 1)
    await service.drain(0.05)
    with pytest.raises(Unavailable):
        await running
    await eventually(lambda: rows(service) == 0)


async def test_close_ends_the_engine(settings: ServiceSettings) -> None:
    service = Service(settings)
    await service.start()
    pid = service.info().engine.pid
    await service.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_nothing_is_there_before_the_start(settings: ServiceSettings) -> None:
    service = Service(settings)
    assert service.info().state == "starting"
    assert service.registry.list() == ()
    sampling = SamplingRequest()
    calls: list[Callable[[], Any]] = [
        lambda: service.encode("x"),
        lambda: service.chat([{"role": "user", "content": "x"}]),
        lambda: service.registry.load_folder("a", Path("x")),
    ]
    for call in calls:
        with pytest.raises(Unavailable):
            await call()
    with pytest.raises(Unavailable):
        service.request(model="tiny", prompt=[1], sampling=sampling)
    assert b"adaplex_engine_up 0.0" in service.metrics.exposition()[0]
    await service.close()


async def test_long_texts_are_tokenized_elsewhere(service: Service) -> None:
    long = "long words " * 2000
    assert await service.encode(long) == tuple(service.text.encode(long))
    messages = [{"role": "user", "content": long}]
    assert await service.chat(messages) == tuple(service.text.chat(messages))
    with pytest.raises(AdaplexError):
        await service.chat([{"role": "user", "content": "\ud800"}])
