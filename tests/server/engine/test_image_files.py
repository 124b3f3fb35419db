"""Images of adapters on disk: read back whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adaplex_adapters.errors import StorageFailed
from adaplex_adapters.reader import read_adapter
from adaplex_loadtest.random_adapters import write_random_lora
from adaplex_server.engine.adapter_source import AdapterSource
from adaplex_server.engine.host_arena import HostArena
from adaplex_server.engine.image_files import ImageFiles
from adaplex_server.model.adapter_image import AdapterImage, ImageLayout
from adaplex_server.model.config import read_config
from adaplex_server.model.families import base_shape
from support.tiny_models import CONFIGS


class Place:
    """A store of one adapter of rank 11, its image files, and how often the store was read."""

    def __init__(self, folder: Path) -> None:
        CONFIGS["llama3"]().save_pretrained(folder)
        self.config = read_config(folder)
        shape = base_shape(self.config)
        self.adapter = read_adapter(write_random_lora(folder / "lora", shape, rank=11, seed=1), shape)
        self.revision = self.adapter.spec.revision
        self.layout = ImageLayout.of(self.config, torch.bfloat16)
        self.arena = HostArena(self.layout.page_bytes, pinned=False)
        self.folder = folder / "images"
        self.reads = 0

    def files(self, keep: set[str]) -> ImageFiles:
        return ImageFiles(self.folder, self.layout, keep)

    def source(self, files: ImageFiles) -> AdapterSource:
        def read(revision: str):  # noqa: ANN202
            self.reads += 1
            if revision != self.revision:
                raise StorageFailed("gone")
            return self.adapter

        return AdapterSource(read, None, self.layout, self.arena, files)

    def path(self) -> Path:
        return self.folder / self.layout.key() / self.revision


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def same(one: AdapterImage, other: AdapterImage) -> bool:
    figures = [(i.revision, i.rank, i.given, i.used, len(i.pages), i.nbytes) for i in (one, other)]
    pages = all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one.pages, other.pages, strict=True)
    )
    return figures[0] == figures[1] and pages and torch.equal(one.scaling, other.scaling)


def test_it_comes_back_without_the_store(place: Place) -> None:
    source = place.source(place.files(set()))
    first = source.load(place.revision)
    source.keep(first)
    again = place.source(place.files({place.revision})).load(place.revision)
    assert same(first, again) and place.reads == 1 and first.rank == 11 and len(first.pages) == 2


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "magic": lambda path: flip(path, 0),
    "length": lambda path: flip(path, 9),
    "header": lambda path: flip(path, 60),
    "first page": lambda path: flip(path, 4096),
    "last page": lambda path: flip(path, path.stat().st_size - 4096),
    "truncated": lambda path: os.truncate(path, 9000),
    "empty": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_image_is_made_again(place: Place, damage: str) -> None:
    source = place.source(place.files(set()))
    first = source.load(place.revision)
    source.keep(first)
    DAMAGES[damage](place.path())
    again = source.load(place.revision)
    assert same(first, again) and place.reads == 2 and not place.path().exists()
    source.keep(again)
    assert same(first, source.load(place.revision)) and place.reads == 2


def test_an_image_of_another_revision_is_not_taken(place: Place) -> None:
    source = place.source(place.files(set()))
    source.keep(source.load(place.revision))
    os.rename(place.path(), place.path().with_name("f" * 64))
    with pytest.raises(StorageFailed, match="gone"):
        source.load("f" * 64)


def test_what_is_not_stored_any_more_goes(place: Place) -> None:
    source = place.source(place.files(set()))
    source.keep(source.load(place.revision))
    (place.folder / "other layout").mkdir()
    place.files({place.revision})
    assert place.path().exists() and not (place.folder / "other layout").exists()
    place.files(set())
    assert not place.path().exists()
    source.keep(source.load(place.revision))
    source.forget(place.revision)
    assert not place.path().exists()


def test_a_folder_that_cannot_be_written_to_costs_only_time(place: Place) -> None:
    place.folder.write_text("no folder")
    source = place.source(place.files(set()))
    image = source.load(place.revision)
    source.keep(image)
    assert same(image, source.load(place.revision)) and place.reads == 2


def test_memory_is_used_again(place: Place) -> None:
    source = place.source(place.files(set()))
    held = source.load(place.revision)
    taken = place.arena.nbytes
    for _ in range(5):
        source.load(place.revision)
    assert place.arena.nbytes == 2 * taken
    before = [page.clone() for page in held.pages]
    with pytest.raises(StorageFailed):
        source.load("e" * 64)
    assert place.arena.nbytes == 2 * taken
    assert all(torch.equal(a, b) for a, b in zip(before, held.pages, strict=True)), "a block was given to two"
