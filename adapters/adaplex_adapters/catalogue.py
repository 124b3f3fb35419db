"""`Catalogue` owns which name points at which revision. SQLite, one writer; a change that returned is durable.

One process holds a catalogue at a time (an exclusive lock beside it). A file that is damaged, foreign or newer than
this version is left as it is, and the process does not start.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaplex_adapters.database import Schema, changing, open_database, read_only, sqlite_errors, version_of
from adaplex_adapters.durable import disk_errors
from adaplex_adapters.errors import NotFound, StartupError, StorageFailed
from adaplex_adapters.names import check_name
from adaplex_adapters.spec import AdapterSpec

SCHEMA_VERSION = 3
SOURCES = ("upload", "folder", "trainer", "composition")
_TABLES = """
CREATE TABLE adapters (
    name TEXT PRIMARY KEY, generation INTEGER NOT NULL, created REAL NOT NULL, source TEXT NOT NULL,
    revision TEXT NOT NULL, kind TEXT NOT NULL, rank INTEGER NOT NULL, targets TEXT NOT NULL,
    parameters INTEGER NOT NULL, nbytes INTEGER NOT NULL, base_model TEXT NOT NULL,
    virtual_tokens INTEGER NOT NULL DEFAULT 0, bottleneck_size INTEGER NOT NULL DEFAULT 0,
    parts TEXT NOT NULL DEFAULT '[]'
) STRICT;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
INSERT INTO counters VALUES ('generation', 0);
"""
_FIRST_COLUMNS = "name, generation, created, source, revision, kind, rank, targets, parameters, nbytes, base_model"
_SECOND_COLUMNS = f"{_FIRST_COLUMNS}, virtual_tokens, bottleneck_size"
_COLUMNS = f"{_SECOND_COLUMNS}, parts"
# From a version to the next one; what is new has the value that it would have had.
_UPGRADES = {
    1: """
ALTER TABLE adapters ADD COLUMN virtual_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE adapters ADD COLUMN bottleneck_size INTEGER NOT NULL DEFAULT 0;
""",
    2: "ALTER TABLE adapters ADD COLUMN parts TEXT NOT NULL DEFAULT '[]';",
}


@dataclass(frozen=True)
class Lineage:
    """One adapter of which a composition was made: its name and revision then, and the weight that it was given."""

    name: str
    weight: float
    revision: str


@dataclass(frozen=True)
class CatalogueEntry:
    """One name. created: when put, in seconds since 1970. source: one of SOURCES. generation: grows with every put.
    parts: of a composition, in their order.
    """

    name: str
    spec: AdapterSpec
    created: float
    source: str
    generation: int
    parts: tuple[Lineage, ...] = ()


class Catalogue:
    """The catalogue in the file `path`, made when there is none. Any thread may call; calls are done one after another.

    Raises StartupError when another process holds it or the file cannot be used, and says what to do.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._held = _hold(path)
        try:
            self._connection = open_database(path, _SCHEMA)
        except BaseException:
            os.close(self._held)
            raise

    def put(self, name: str, spec: AdapterSpec, source: str, parts: tuple[Lineage, ...] = ()) -> CatalogueEntry:
        """Point `name` at the adapter, whatever it pointed at before."""
        check_name(name)
        assert source in SOURCES, source
        with self._changing("Recording the adapter") as connection:
            connection.execute("UPDATE counters SET value = value + 1 WHERE name = 'generation'")
            (generation,) = connection.execute("SELECT value FROM counters WHERE name = 'generation'").fetchone()
            entry = CatalogueEntry(name, spec, time.time(), source, generation, parts)
            connection.execute(
                f"INSERT OR REPLACE INTO adapters ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                _row(entry),
            )
        return entry

    def get(self, name: str) -> CatalogueEntry | None:
        """The entry of this name."""
        rows = self._select("WHERE name = ?", name)
        return rows[0] if rows else None

    def entries(self) -> tuple[CatalogueEntry, ...]:
        """All entries, by name."""
        return self._select("ORDER BY name")

    def remove(self, name: str) -> CatalogueEntry:
        """Forget the name; what it pointed at. NotFound when there is none."""
        with self._changing("Forgetting the adapter") as connection:
            row = connection.execute(f"SELECT {_COLUMNS} FROM adapters WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise NotFound(f"There is no adapter named {name[:96]!a}.")
            connection.execute("DELETE FROM adapters WHERE name = ?", (name,))
        return _entry(row)

    def close(self) -> None:
        """Close the file and let others hold it. Calling it again does nothing."""
        with self._lock:
            if self._held >= 0:
                self._connection.close()
                os.close(self._held)
                self._held = -1

    def _select(self, rest: str, *values: str) -> tuple[CatalogueEntry, ...]:
        with self._lock, sqlite_errors("Reading the catalogue"):
            rows = self._connection.execute(f"SELECT {_COLUMNS} FROM adapters {rest}", values).fetchall()
        return tuple(_entry(row) for row in rows)

    @contextmanager
    def _changing(self, doing: str) -> Iterator[sqlite3.Connection]:
        with self._lock, changing(self._connection, doing) as connection:
            yield connection


def peek(path: Path) -> tuple[CatalogueEntry, ...]:
    """The entries of a catalogue by name, read without holding it, also while a server does; empty when there is none.

    Raises StartupError when the file cannot be used.
    """
    if not path.exists():
        return ()
    connection = read_only(path, _SCHEMA)
    try:
        with sqlite_errors("Reading the catalogue"):
            return _all_entries(connection)
    finally:
        connection.close()


def _hold(path: Path) -> int:
    """A descriptor that holds the lock until it is closed, also by the process's death."""
    try:
        with disk_errors("Opening the catalogue"):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            held = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except StorageFailed as error:
        raise StartupError(f"{error.message} Choose another data folder, or make this one writable.") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise StartupError(
            "Another server uses this data folder. Stop it first, or give this one a data folder of its own."
        ) from None
    return held


def _columns(connection: sqlite3.Connection) -> str:
    """What can be selected, also from a catalogue that has not been upgraded."""
    known = {1: f"{_FIRST_COLUMNS}, 0, 0, '[]'", 2: f"{_SECOND_COLUMNS}, '[]'"}
    return known.get(version_of(connection), _COLUMNS)


def _all_entries(connection: sqlite3.Connection) -> tuple[CatalogueEntry, ...]:
    rows = connection.execute(f"SELECT {_columns(connection)} FROM adapters ORDER BY name").fetchall()
    return tuple(_entry(row) for row in rows)


def _row(entry: CatalogueEntry) -> tuple[Any, ...]:
    spec = entry.spec
    return (
        entry.name,
        entry.generation,
        entry.created,
        entry.source,
        spec.revision,
        spec.kind,
        spec.rank,
        json.dumps(spec.targets),
        spec.parameters,
        spec.nbytes,
        spec.base_model,
        spec.virtual_tokens,
        spec.bottleneck_size,
        json.dumps([(part.name, part.weight, part.revision) for part in entry.parts]),
    )


def _entry(row: tuple[Any, ...]) -> CatalogueEntry:
    name, generation, created, source, revision, kind, rank, targets, *sizes, parts = row
    spec = AdapterSpec(revision, kind, rank, tuple(json.loads(targets)), *sizes)
    lineage = tuple(Lineage(*part) for part in json.loads(parts))
    return CatalogueEntry(name, spec, created, source, generation, lineage)


_SCHEMA = Schema(
    what="The catalogue",
    application=0x41445058,  # "ADPX"
    version=SCHEMA_VERSION,
    statements=_TABLES,
    advice="restore it from a backup, or move the whole folder that it lies in away and load the adapters again.",
    upgrades=_UPGRADES,
    probe=_all_entries,
)
