"""Names and revisions under change: reloads while streams run, unloads, failures half-way, restarts, crowds."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from adaplex_adapters.errors import (
    AdaplexError,
    Conflict,
    InvalidAdapter,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    StartupError,
    StorageFailed,
)
from adaplex_server.caller import ANYONE, Caller
from adaplex_server.service.access.key_store import KeyStore
from adaplex_server.service.limits import SamplingRequest
from adaplex_server.service.service import Service
from adaplex_server.service.settings import ServiceSettings
from adaplex_server.vocabulary import Delta

Starter = Callable[..., Awaitable[Service]]


async def stamp(service: Service, name: str) -> str:
    """The revision that answers to this name, from the answer's own text."""
    request = service.request(model=name, prompt=[5], sampling=SamplingRequest(max_tokens=64))
    async with aclosing(service.generate(request)) as items:
        return "".join([item.text async for item in items if isinstance(item, Delta)])


def stream(service: Service, name: str, tokens: int = 300) -> Any:
    return service.generate(service.request(model=name, prompt=[5], sampling=SamplingRequest(max_tokens=tokens)))


async def rest(items: Any, before: str = "") -> str:
    return before + "".join([item.text async for item in items if isinstance(item, Delta)])


def stored(service: Service) -> set[str]:
    return {folder.name for folder in Path(service.settings.engine.store, "revisions").iterdir()}


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_server_with_keys_tells_no_names_to_who_asks_for_a_wrong_one(running: Starter, tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.sqlite3")
    service = await running(keys=keys)
    with pytest.raises(ModelNotFound, match="there are: tiny"):
        service.registry.describe("team-nothing")
    keys.create(Caller(None, "team", models=("team-*",)), None)
    with pytest.raises(ModelNotFound) as refused:
        service.registry.describe("team-nothing")
    assert "tiny" not in refused.value.message


async def test_a_job_cannot_make_what_is_named_like_the_base(service: Service) -> None:
    upload = service.settings.data_dir / "upload"
    upload.write_text("{}")
    file = service.training.files.take(upload, "x", "fine-tune")
    with pytest.raises(Conflict, match="a name of the base"):
        await service.training.create(
            training_file=file.id, validation_file=None, adapter="Tiny", options={}, seed=1, register_worse=False,
            caller=ANYONE, metadata={},
        )  # fmt: skip
    assert not service.training.rows.jobs()


async def test_upload_is_served_listed_and_survives_a_restart(
    running: Starter, adapters: tuple[Path, ...], tmp_path: Path
) -> None:
    service = await running()
    with service.registry.staging() as staging:
        shutil.copytree(adapters[0], staging / "adapter")
        info = await service.registry.upload("itn", staging / "adapter")
    assert (info.name, info.rank, info.targets, info.source) == ("itn", 4, ("q_proj", "v_proj"), "upload")
    assert info.servable and service.registry.list() == (info,)
    await service.close()
    again = await running()
    assert again.registry.describe("itn").revision == info.revision
    assert again.registry.describe("itn").state == "ready"
    assert await stamp(again, "itn") == info.revision


async def test_reload_under_streams(service: Service, adapters: tuple[Path, ...]) -> None:
    old = await service.registry.load_folder("x", adapters[0])
    streams = [stream(service, "x") for _ in range(3)]
    begun = [(await anext(items)).text for items in streams]
    new = await service.registry.load_folder("x", adapters[1])
    assert new.revision != old.revision
    assert stored(service) == {old.revision, new.revision}
    assert service.registry.describe("x").running == 3
    assert await stamp(service, "x") == new.revision
    for text in await asyncio.gather(*(rest(items, text) for items, text in zip(streams, begun, strict=True))):
        assert text.count(old.revision) == 300 // len(text.split(".")[0] + ".") and new.revision not in text
    await eventually(lambda: stored(service) == {new.revision})
    assert service.registry.describe("x").running == 0


async def test_reload_without_streams_has_dropped_the_old_when_it_answers(
    service: Service, adapters: tuple[Path, ...]
) -> None:
    await service.registry.load_folder("x", adapters[0])
    new = await service.registry.load_folder("x", adapters[1])
    assert stored(service) == {new.revision}


async def test_unload_under_streams(service: Service, adapters: tuple[Path, ...]) -> None:
    old = await service.registry.load_folder("x", adapters[0])
    items = stream(service, "x")
    text = (await anext(items)).text
    await service.registry.unload("x")
    with pytest.raises(ModelNotFound):
        await anext(stream(service, "tiny-or-x"))
    with pytest.raises(ModelNotFound):
        service.registry.resolve("x")
    assert service.registry.list() == ()
    assert old.revision in await rest(items, text)
    await eventually(lambda: stored(service) == set())


async def test_unload_without_streams_has_freed_when_it_answers(
    running: Starter, adapters: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_LOG", str(log))
    service = await running()
    info = await service.registry.load_folder("x", adapters[0])
    await service.registry.unload("x")
    assert stored(service) == set()
    assert f"DropAdapter {info.revision}" in log.read_text()


async def test_same_content_under_two_names_is_one_revision(service: Service, adapters: tuple[Path, ...]) -> None:
    one = await service.registry.load_folder("one", adapters[0])
    two = await service.registry.load_folder("two", adapters[0])
    assert one.revision == two.revision
    await service.registry.unload("one")
    assert stored(service) == {two.revision}
    assert await stamp(service, "two") == two.revision


async def test_recreated_name_gets_the_new_content(service: Service, adapters: tuple[Path, ...]) -> None:
    for folder in (adapters[0], adapters[1], adapters[0]):
        info = await service.registry.load_folder("x", folder)
        assert await stamp(service, "x") == info.revision
        await service.registry.unload("x")


async def test_refused_proof_leaves_everything_as_it_was(
    service: Service, running: Starter, adapters: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.close()
    monkeypatch.setenv("FAKE_REFUSE", "1")
    refusing = await running()
    with pytest.raises(InvalidAdapter, match="on purpose"):
        await refusing.registry.load_folder("x", adapters[0])
    assert refusing.registry.list() == () and stored(refusing) == set()
    await refusing.close()
    monkeypatch.delenv("FAKE_REFUSE")
    assert (await running()).registry.list() == ()


@pytest.mark.parametrize("broken", ["put", "commit"])
async def test_failing_disk_leaves_the_old_revision(
    service: Service, adapters: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    old = await service.registry.load_folder("x", adapters[0])

    def fail(*_: object) -> None:
        raise StorageFailed("the disk is full")

    owner = "catalogue.Catalogue.put" if broken == "put" else "store.AdapterStore.commit"
    monkeypatch.setattr(f"adaplex_adapters.{owner}", fail)
    with pytest.raises(StorageFailed):
        await service.registry.load_folder("x", adapters[1])
    assert service.registry.describe("x").revision == old.revision
    assert stored(service) == {old.revision}
    assert await stamp(service, "x") == old.revision


@pytest.mark.parametrize("name", ["tiny", "Tiny", "base"])
async def test_names_of_the_base_are_taken(service: Service, adapters: tuple[Path, ...], name: str) -> None:
    with pytest.raises(Conflict):
        await service.registry.load_folder(name, adapters[0])
    if name != "Tiny":
        with pytest.raises(Conflict):
            await service.registry.unload(name)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x" * 200, "é", ".hidden"])
async def test_impossible_names(service: Service, adapters: tuple[Path, ...], name: str) -> None:
    with pytest.raises(InvalidRequest):
        await service.registry.load_folder(name, adapters[0])
    with pytest.raises(ModelNotFound):
        await service.registry.unload(name)


async def test_crowd_of_changes_ends_in_one_clean_state(service: Service, adapters: tuple[Path, ...]) -> None:
    """Uploads and deletions of one name at once, requests and lists between them: each answer is of one revision."""
    revisions = {(await service.registry.load_folder(f"keep{i}", folder)).revision for i, folder in enumerate(adapters)}

    async def change(turn: int) -> None:
        try:
            if turn % 3 == 2:
                await service.registry.unload("x")
            else:
                await service.registry.upload("x", adapters[turn % 2])
        except ModelNotFound:
            pass

    async def use() -> None:
        with contextlib.suppress(ModelNotFound):
            assert await stamp(service, "x") in revisions
        assert {info.name for info in service.registry.list()} >= {"keep0", "keep1", "keep2"}

    await asyncio.gather(*(change(turn) for turn in range(12)), *(use() for _ in range(8)))
    final = await service.registry.load_folder("x", adapters[2])
    assert await stamp(service, "x") == final.revision
    assert stored(service) == revisions


async def test_caller_that_goes_away_does_not_stop_a_load(service: Service, adapters: tuple[Path, ...]) -> None:
    load = asyncio.create_task(service.registry.load_folder("x", adapters[0]))
    await asyncio.sleep(0)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    await eventually(lambda: bool(service.registry.list()))
    assert await stamp(service, "x") == service.registry.describe("x").revision


# ---- folders and paths -----------------------------------------------------------------------------------------------


async def test_adapters_of_the_settings_are_served_at_start_and_bad_ones_are_told(
    running: Starter, adapters: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(adapters[0], folder / "good")
    (folder / "bad").mkdir(parents=True)
    # The fake base is called tiny: its name is nobody else's.
    folders = {"bad": folder / "bad", "good": folder / "good", "tiny": folder / "good"}
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_LOG", str(log))
    service = await running(startup_adapters=folders)
    listed = {info.name: info for info in service.registry.list()}
    assert {name: info.state for name, info in listed.items()} == {"good": "resident", "bad": "failed"}
    assert "adapter_config.json" in listed["bad"].reason
    with pytest.raises(ModelNotFound, match="cannot be served"):
        service.registry.resolve("bad")
    await service.close()
    loads = log.read_text().count("LoadAdapter")
    again = await running(startup_adapters=folders)
    assert again.registry.describe("good").revision == listed["good"].revision
    assert log.read_text().count("LoadAdapter") == loads  # unchanged content is not proved again


async def test_paths_from_clients_stay_inside_the_folder(
    running: Starter, adapters: tuple[Path, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(adapters[0], folder / "sub" / "good")
    (folder / "link").symlink_to(adapters[1])
    service = await running(adapters_dir=folder)
    for path in ("sub/good", str(folder / "sub" / "good")):
        info = await service.registry.load_path("x", path)
        assert info.revision == service.registry.describe("x").revision
        await service.registry.unload("x")
    for path in ("..", "../mine/../..", str(adapters[0]), "/", "link", "sub/../..", "a\0b", "", "x" * 5000):
        with pytest.raises(InvalidRequest):
            await service.registry.load_path("x", path)
    with pytest.raises(NotFound):
        await service.registry.load_path("x", "sub/none")


async def test_paths_need_a_folder(service: Service) -> None:
    with pytest.raises(InvalidRequest, match="no adapter folder"):
        await service.registry.load_path("x", "/tmp")


async def test_content_that_is_gone_is_told_and_not_a_crash(
    running: Starter, adapters: tuple[Path, ...], settings: ServiceSettings
) -> None:
    service = await running()
    info = await service.registry.load_folder("x", adapters[0])
    await service.close()
    shutil.rmtree(Path(settings.engine.store, "revisions", info.revision))
    (Path(settings.engine.store, "revisions") / ("0" * 64)).mkdir()
    again = await running()
    assert stored(again) == set()
    assert again.registry.describe("x").state == "failed"
    with pytest.raises(AdaplexError, match="gone"):
        await stamp(again, "x")
    await again.registry.load_folder("x", adapters[0])
    assert await stamp(again, "x") == info.revision


async def test_a_lost_catalogue_does_not_take_the_adapters_with_it(
    running: Starter, adapters: tuple[Path, ...]
) -> None:
    service = await running()
    await service.registry.load_folder("itn", adapters[0])
    kept = stored(service)
    await service.close()
    catalogue = service.settings.data_dir / "catalogue.sqlite3"
    away = catalogue.rename(catalogue.with_name("away"))
    for _ in range(2):
        with pytest.raises(StartupError, match=r"gone.*restore catalogue"):
            await running()
    assert stored(service) == kept
    away.rename(catalogue)
    assert (await running()).registry.describe("itn").state == "ready"


async def test_an_upload_over_a_folder_of_the_settings_survives_a_restart(
    running: Starter, adapters: tuple[Path, ...]
) -> None:
    service = await running()
    await service.registry.load_folders({"itn": adapters[0]})
    folder = service.registry.describe("itn").revision
    uploaded = (await service.registry.upload("itn", adapters[1])).revision
    await service.close()
    again = await running()
    await again.registry.load_folders({"itn": adapters[0]})
    assert again.registry.describe("itn").revision == uploaded != folder
    await again.registry.unload("itn")
    await again.registry.load_folders({"itn": adapters[0]})
    assert again.registry.describe("itn").revision == folder
