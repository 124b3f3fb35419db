"""Jobs through a real process that only pretends to train."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from adaplex_adapters.errors import (
    Conflict,
    InvalidAdapter,
    InvalidRequest,
    NotFound,
    StorageFailed,
    Unavailable,
)
from adaplex_server.caller import ANYONE, Caller
from adaplex_server.service.training import runner
from adaplex_server.service.training.fine_tuning import FineTuning
from adaplex_server.service.training.settings import TrainingSettings
from adaplex_server.service.training.types import Job

COMMAND = (sys.executable, str(Path(__file__).parent / "fake_trainer.py"))


class World:
    """A service's folder, and the adapters that were registered."""

    def __init__(self, folder: Path) -> None:
        self.settings = TrainingSettings(
            folder=folder, base=folder / "base", base_name="tiny", command=COMMAND, retry_seconds=0.0,
            check_options=lambda options: None,
        )  # fmt: skip
        self.registered: dict[str, Path] = {}
        self.refusal: Exception | None = None
        self.refusals = 1 << 30
        self.asked = 0
        self.waits: asyncio.Event | None = None
        self.tuning = FineTuning(self.settings, self.register)

    async def register(self, name: str, folder: Path) -> str:
        self.asked += 1
        if self.waits is not None:
            await self.waits.wait()
        if self.refusal and self.asked <= self.refusals:
            raise self.refusal
        self.registered[name] = folder
        return "ab" * 32

    async def again(self) -> None:
        self.tuning = FineTuning(self.settings, self.register)
        await self.tuning.open()

    def upload(self) -> str:
        path = self.settings.folder / "upload"
        path.write_text('{"prompt": "a", "completion": "b"}\n')
        return self.tuning.files.take(path, "train.jsonl", "fine-tune").id

    async def create(self, **options: Any) -> Job:
        worse = options.pop("register_worse", False)
        return await self.tuning.create(
            training_file=self.upload(), validation_file=None, adapter="made", options=options, seed=1,
            register_worse=worse, caller=ANYONE, metadata={},
        )  # fmt: skip

    async def ended(self, job: Job) -> Job:
        async with asyncio.timeout(20):
            async for _ in self.tuning.watch(job.id):
                pass
        return self.tuning.rows.job(job.id)

    def words(self, job: Job) -> list[str]:
        return [event.told.message for event in self.tuning.rows.events(job.id) if event.told.kind == "message"]

    def steps(self, job: Job) -> list[int]:
        events = self.tuning.rows.events(job.id)
        return [event.told.data["step"] for event in events if event.told.data.get("type") == "step"]


@pytest_asyncio.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(runner, "_POLL_SECONDS", 0.02)
    made = World(tmp_path)
    await made.tuning.open()
    yield made
    await made.tuning.close()


async def until(world: World, job: Job, status: str) -> None:
    async with asyncio.timeout(10):
        while world.tuning.rows.job(job.id).status != status:
            await asyncio.sleep(0.01)


async def test_a_job_is_trained_registered_and_told(world: World) -> None:
    job = await world.create()
    done = await world.ended(job)
    assert (done.status, done.revision, done.trained_tokens) == ("succeeded", "ab" * 32, 1000)
    assert world.registered == {"made": world.settings.folder / "jobs" / job.id / "result"}
    assert world.steps(job) == [1, 2, 3]
    assert [one.step for one in world.tuning.rows.checkpoints(job.id)] == [3, 2, 1]
    (report,) = done.result_files
    assert world.tuning.files.path(report).read_text() == "<p>fine"
    assert world.tuning.rows.file(report).purpose == "fine-tune-results"


async def test_a_trainer_that_dies_goes_on_from_its_checkpoint(world: World) -> None:
    job = await world.create(crash=2)
    done = await world.ended(job)
    assert done.status == "succeeded" and done.attempts == 2
    assert world.steps(job) == [1, 2, 3]
    assert any("signal 9" in words for words in world.words(job))


async def test_a_trainer_that_always_dies_fails_the_job(world: World) -> None:
    done = await world.ended(await world.create(crash="always"))
    assert done.status == "failed" and done.error is not None
    assert done.error.code == "trainer_crashed" and done.attempts == 3


async def test_a_refusal_is_told_in_the_trainers_words(world: World) -> None:
    done = await world.ended(await world.create(refuse=True))
    assert done.error is not None
    assert (done.status, done.error.param, done.error.message) == ("failed", "training_file", "line 3 is not JSON")


async def test_a_result_worse_than_the_base_is_served_only_if_asked_for(world: World) -> None:
    done = await world.ended(await world.create(worse=True))
    assert (done.status, done.revision, world.registered) == ("succeeded", None, {})
    done = await world.ended(await world.create(worse=True, register_worse=True))
    assert done.revision and set(world.registered) == {"made"}


async def test_an_adapter_that_is_refused_fails_the_job(world: World) -> None:
    world.refusal = InvalidAdapter("NaN in q_proj")
    done = await world.ended(await world.create())
    assert done.error is not None and done.error.code == "invalid_adapter"


async def test_pause_and_resume(world: World) -> None:
    job = await world.create(steps=50, pace=0.03)
    await until(world, job, "running")
    await asyncio.sleep(0.2)
    await world.tuning.pause(job.id)
    assert (await world.ended(job)).status == "paused"
    await asyncio.sleep(0.2)
    before = len(world.steps(job))
    await world.tuning.resume(job.id)
    assert (await world.ended(job)).status == "succeeded"
    assert world.steps(job) == list(range(1, 51)) and before < 50
    with pytest.raises(Conflict):
        await world.tuning.pause(job.id)


async def test_cancel_ends_at_once_and_clears_up(world: World) -> None:
    waiting = [await world.create(steps=500, pace=0.02) for _ in range(2)]
    await until(world, waiting[0], "running")
    for job in reversed(waiting):
        assert (await world.tuning.cancel(job.id)).status == "cancelled"
    async with asyncio.timeout(5):
        while (world.settings.folder / "jobs" / waiting[0].id).exists():
            await asyncio.sleep(0.01)
    assert world.registered == {}
    with pytest.raises(Conflict):
        await world.tuning.cancel(waiting[0].id)


async def test_a_job_goes_on_after_a_restart_of_the_server(world: World) -> None:
    job = await world.create(steps=40, pace=0.02)
    await until(world, job, "running")
    await asyncio.sleep(0.2)
    await world.tuning.close()
    await world.again()
    done = await world.ended(job)
    assert done.status == "succeeded"
    assert world.steps(job) == list(range(1, 41))


async def test_a_job_goes_on_after_the_server_was_killed(world: World) -> None:
    job = await world.create(steps=40, pace=0.02)
    await until(world, job, "running")
    await asyncio.sleep(0.2)
    # What kill -9 of both leaves behind: a row that says "running", events without their end.
    opened = world.tuning._opened
    assert opened is not None
    ledger, running = opened
    running._closing = True
    assert running._running is not None
    os.kill(running._running[1]._process.pid, signal.SIGKILL)
    running._worker.cancel()
    await asyncio.sleep(0.1)
    with (ledger.job_folder(job.id) / "events.jsonl").open("a") as file:
        file.write('{"kind": "metr\n')
    ledger.rows.close()
    await world.again()
    done = await world.ended(job)
    assert done.status == "succeeded"
    assert world.steps(job) == list(range(1, 41))


async def test_unknown_files_and_jobs(world: World) -> None:
    with pytest.raises(NotFound):
        await world.tuning.create(
            training_file="file-x", validation_file=None, adapter=None, options={}, seed=None, register_worse=False,
            caller=ANYONE, metadata={},
        )  # fmt: skip
    with pytest.raises(NotFound):
        await world.tuning.cancel("ftjob-x")
    assert world.tuning.rows.jobs() == ()


async def test_an_engine_that_comes_back_registers_what_was_trained(world: World) -> None:
    world.refusal, world.refusals = Unavailable("the engine is being started", retry_after=0.01), 2
    done = await world.ended(await world.create())
    assert (done.status, done.attempts, world.asked) == ("succeeded", 1, 3)


async def test_a_job_that_waits_for_the_engine_can_be_cancelled(world: World) -> None:
    world.refusal = Unavailable("the engine is being started", retry_after=0.01)
    job = await world.create()
    async with asyncio.timeout(10):
        while not world.asked:
            await asyncio.sleep(0.01)
        while world.tuning.rows.job(job.id).status != "cancelled":
            with contextlib.suppress(Conflict):
                await world.tuning.cancel(job.id)
            await asyncio.sleep(0)
    assert (await world.ended(await world.create(worse=True))).status == "succeeded"


@pytest.mark.parametrize("change", ["cancel", "pause"])
async def test_a_job_that_is_being_registered_is_changed_by_nobody(world: World, change: str) -> None:
    world.waits = asyncio.Event()
    job = await world.create()
    async with asyncio.timeout(10):
        while not world.asked:
            await asyncio.sleep(0.01)
    with pytest.raises(Conflict, match="being registered"):
        await getattr(world.tuning, change)(job.id)
    world.waits.set()
    assert (await world.ended(job)).status == "succeeded"


async def test_a_result_that_was_told_before_a_restart_is_registered_after_it(world: World) -> None:
    """The trainer tells its end once: a server that is killed while it registers the result finds it in the log."""
    job = await world.create(once=True)
    world.waits = asyncio.Event()
    async with asyncio.timeout(10):
        while not world.asked:
            await asyncio.sleep(0.01)
    opened = world.tuning._opened
    assert opened is not None
    opened[1]._worker.cancel()
    await asyncio.sleep(0.05)
    opened[0].rows.close()
    world.waits = None
    await world.again()
    done = await world.ended(job)
    assert (done.status, done.revision, done.attempts) == ("succeeded", "ab" * 32, 2)


async def test_a_disk_that_fails_for_a_while_holds_jobs_up_and_loses_none(world: World) -> None:
    opened = world.tuning._opened
    assert opened is not None
    record, failing = opened[0].rows.record, [3]

    def full(*args: Any, **more: Any) -> None:
        job = args[0]
        if job.status != "queued" and failing[0]:
            failing[0] -= 1
            raise StorageFailed("database or disk is full")
        record(*args, **more)

    opened[0].rows.record = full  # type: ignore[method-assign]
    jobs = [await world.create(), await world.create()]
    assert [(await world.ended(job)).status for job in jobs] == ["succeeded", "succeeded"]
    assert not failing[0]


async def test_a_paused_job_that_is_cancelled_leaves_nothing(world: World) -> None:
    job = await world.create(steps=500, pace=0.02)
    await until(world, job, "running")
    await world.tuning.pause(job.id)
    folder = world.settings.folder / "jobs" / job.id
    await asyncio.sleep(0.3)
    await world.tuning.cancel(job.id)
    async with asyncio.timeout(5):
        while folder.exists():
            await asyncio.sleep(0.01)


async def test_a_seed_among_the_options_is_the_jobs(world: World) -> None:
    job = await world.tuning.create(
        training_file=world.upload(), validation_file=None, adapter="made", options={"data_seed": "7", "steps": 1},
        seed=None, register_worse=False, caller=ANYONE, metadata={},
    )  # fmt: skip
    assert (job.seed, dict(job.options)) == (7, {"steps": 1})


async def test_files_and_jobs_belong_to_whom_their_key_was_made_for(world: World) -> None:
    mine, theirs = (Caller(name, f"team-{name}", models=(f"{name}-*",)) for name in ("a", "b"))
    successor, operator = Caller("c", "team-a", models=("a-*",)), Caller("d", "operator")
    path = world.settings.folder / "upload"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    file = world.tuning.files.take(path, "train.jsonl", "fine-tune", mine.owner)

    async def create(caller: Caller, name: str | None) -> Job:
        return await world.tuning.create(
            training_file=file.id, validation_file=None, adapter=name, options={}, seed=1, register_worse=False,
            caller=caller, metadata={},
        )  # fmt: skip

    job = await create(mine, "a-made")
    for caller in (mine, successor, operator, ANYONE):
        assert world.tuning.file(file.id, caller) == file and world.tuning.job(job.id, caller).id == job.id
        assert world.tuning.files_of(caller) and world.tuning.jobs_of(caller)
    assert not world.tuning.files_of(theirs) and not world.tuning.jobs_of(theirs)
    for ask in (lambda: world.tuning.file(file.id, theirs), lambda: world.tuning.job(job.id, theirs)):
        with pytest.raises(NotFound):
            ask()
    with pytest.raises(NotFound):
        await create(theirs, "b-made")
    for name in (None, "b-made"):
        with pytest.raises(InvalidRequest, match="none of these"):
            await create(mine, name)
    done = await world.ended(job)
    assert {world.tuning.rows.file(one).owner for one in done.result_files} == {"team-a"}
