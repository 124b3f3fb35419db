from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adaplex_adapters.catalogue import SCHEMA_VERSION, Catalogue, Lineage, peek
from adaplex_adapters.errors import InvalidRequest, NotFound, StartupError, StorageFailed
from adaplex_adapters.spec import AdapterSpec

SPEC = AdapterSpec("a" * 64, "lora", 8, ("k_proj", "q_proj"), 100, 400, "org/base")
OTHER = AdapterSpec("b" * 64, "lora", 16, ("up_proj",), 1, 2, "")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "catalogue.sqlite3"


@pytest.fixture
def catalogue(path: Path) -> Iterator[Catalogue]:
    opened = Catalogue(path)
    yield opened
    opened.close()


def test_put_get_remove(catalogue: Catalogue) -> None:
    assert catalogue.get("a") is None and catalogue.entries() == ()
    entry = catalogue.put("b", SPEC, "upload")
    assert catalogue.get("b") == entry and entry.spec == SPEC and entry.source == "upload"
    first = catalogue.put("a", OTHER, "folder")
    assert [e.name for e in catalogue.entries()] == ["a", "b"]
    again = catalogue.put("b", OTHER, "trainer")
    assert catalogue.get("b") == again and again.generation > first.generation > entry.generation
    assert catalogue.remove("b") == again and catalogue.get("b") is None
    with pytest.raises(NotFound):
        catalogue.remove("b")
    assert catalogue.put("b", SPEC, "upload").generation > again.generation


def test_names_are_checked(catalogue: Catalogue) -> None:
    for name in ("../x", "", "a b"):
        with pytest.raises(InvalidRequest):
            catalogue.put(name, SPEC, "upload")
    with pytest.raises(NotFound):
        catalogue.remove("'; DROP TABLE adapters; --")


def test_it_lasts(path: Path) -> None:
    first = Catalogue(path)
    entry = first.put("a", SPEC, "upload")
    first.close()
    first.close()
    second = Catalogue(path)
    assert second.entries() == (entry,)
    assert second.put("b", SPEC, "upload").generation > entry.generation
    second.close()


def test_one_holder(catalogue: Catalogue, path: Path) -> None:
    catalogue.put("a", SPEC, "upload")
    with pytest.raises(StartupError, match="Another server"):
        Catalogue(path)
    assert [entry.name for entry in peek(path)] == ["a"]
    catalogue.close()
    Catalogue(path).close()


def test_peek_without_one(path: Path) -> None:
    assert peek(path) == ()
    assert not path.parent.exists()


BROKEN = {
    "empty": b"",
    "garbage": b"this is no database" * 100,
    "half a header": b"SQLite format 3\0",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_file_is_left_alone(kind: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(BROKEN[kind])
    for opening in (Catalogue, peek):
        with pytest.raises(StartupError, match=f"{'is empty' if kind == 'empty' else ''}.*left as it is"):
            opening(path)
    assert path.read_bytes() == BROKEN[kind]


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.9])
def test_overwritten_pages_are_found(where: float, path: Path) -> None:
    catalogue = Catalogue(path)
    for number in range(60):
        catalogue.put(f"adapter-{number}", SPEC, "upload")
    catalogue.close()
    data = bytearray(path.read_bytes())
    at = int(len(data) * where)
    data[at : at + 6000] = b"\x55" * len(data[at : at + 6000])
    path.write_bytes(data)
    with pytest.raises(StartupError, match="left as it is"):
        Catalogue(path)
    assert path.read_bytes() == data


def test_a_truncated_file_is_found(path: Path) -> None:
    catalogue = Catalogue(path)
    for number in range(60):
        catalogue.put(f"adapter-{number}", SPEC, "upload")
    catalogue.close()
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(StartupError, match="left as it is"):
        Catalogue(path)


def test_a_newer_version_is_left_alone(path: Path) -> None:
    Catalogue(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StartupError, match="newer version"):
        Catalogue(path)
    assert path.read_bytes() == before


def test_a_foreign_database_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE adapters (name TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StartupError, match="another program"):
        Catalogue(path)
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="data folder"):
        Catalogue(tmp_path / "file" / "catalogue.sqlite3")


def test_many_threads(catalogue: Catalogue) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                catalogue.put(f"t{number}", SPEC if turn % 2 else OTHER, "upload")
                assert catalogue.get(f"t{number}") is not None
                catalogue.entries()
                if turn % 3 == 2:
                    catalogue.remove(f"t{number}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    generations = [entry.generation for entry in catalogue.entries()]
    assert len(set(generations)) == 8 and max(generations) == 80


def test_a_disk_that_refuses(catalogue: Catalogue, path: Path) -> None:
    catalogue.put("a", SPEC, "upload")
    catalogue._connection.execute("PRAGMA max_page_count = 1")
    catalogue._connection.execute("PRAGMA query_only = 1")
    with pytest.raises(StorageFailed):
        catalogue.put("b", SPEC, "upload")
    catalogue._connection.execute("PRAGMA query_only = 0")
    assert [entry.name for entry in catalogue.entries()] == ["a"]


WRITER = """
import sys
from pathlib import Path
from adaplex_adapters.catalogue import Catalogue
from adaplex_adapters.spec import AdapterSpec

catalogue = Catalogue(Path(sys.argv[1]))
for number in range(100_000):
    catalogue.put(f"a{number}", AdapterSpec("a" * 64, "lora", 8, ("q",), 1, 1, ""), "upload")
    print(number, flush=True)
"""


def test_what_was_acknowledged_survives_a_kill(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(17):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        acknowledged = [int(line) for line in writer.stdout.read().split()]  # what it had said before it died
    catalogue = Catalogue(path)
    names = {entry.name for entry in catalogue.entries()}
    assert names >= {f"a{number}" for number in range(max([16, *acknowledged]) + 1)}
    catalogue.close()


def test_a_log_without_its_catalogue_is_not_played_into_a_new_one(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    assert path.with_name(path.name + "-wal").stat().st_size > 0
    path.unlink()
    catalogue = Catalogue(path)
    assert catalogue.entries() == ()
    catalogue.close()


@pytest.mark.parametrize("version", [1, 2])
def test_a_catalogue_of_an_older_version_is_read_and_upgraded(version: int, tmp_path: Path) -> None:
    path = tmp_path / "catalogue.sqlite"
    opened = Catalogue(path)
    opened.put("old", SPEC, "upload")
    opened.close()
    newer = ("parts",) if version == 2 else ("parts", "virtual_tokens", "bottleneck_size")
    connection = sqlite3.connect(path)
    connection.executescript(
        "".join(f"ALTER TABLE adapters DROP COLUMN {column};" for column in newer) + f"PRAGMA user_version = {version};"
    )
    connection.close()
    assert [(entry.spec, entry.parts) for entry in peek(path)] == [(SPEC, ())]
    soft = replace(SPEC, kind="prefix_tuning", virtual_tokens=20, bottleneck_size=3)
    parts = (Lineage("a", 0.7, "f" * 64), Lineage("b", -1.0, "0" * 64))
    opened = Catalogue(path)
    opened.put("new", soft, "composition", parts)
    expected = {"old": (SPEC, ()), "new": (soft, parts)}
    assert {entry.name: (entry.spec, entry.parts) for entry in opened.entries()} == expected
    opened.close()
    assert {entry.name: (entry.spec, entry.parts) for entry in peek(path)} == expected
