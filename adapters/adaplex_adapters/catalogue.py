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

from adaplex_adapters.durable import disk_errors, sync
from adaplex_adapters.errors import NotFound, StartupError, StorageFailed
from adaplex_adapters.names import check_name
from adaplex_adapters.spec import AdapterSpec

SCHEMA_VERSION = 3
SOURCES = ("upload", "folder", "trainer", "composition")
_APPLICATION_ID = 0x41445058  # "ADPX"
_SCHEMA = f"""
CREATE TABLE adapters (
    name TEXT PRIMARY KEY, generation INTEGER NOT NULL, created REAL NOT NULL, source TEXT NOT NULL,
    revision TEXT NOT NULL, kind TEXT NOT NULL, rank INTEGER NOT NULL, targets TEXT NOT NULL,
    parameters INTEGER NOT NULL, nbytes INTEGER NOT NULL, base_model TEXT NOT NULL,
    virtual_tokens INTEGER NOT NULL DEFAULT 0, bottleneck_size INTEGER NOT NULL DEFAULT 0,
    parts TEXT NOT NULL DEFAULT '[]'
) STRICT;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
INSERT INTO counters VALUES ('generation', 0);
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""
_FIRST_COLUMNS = "name, generation, created, source, revision, kind, rank, targets, parameters, nbytes, base_model"
_SECOND_COLUMNS = f"{_FIRST_COLUMNS}, virtual_tokens, bottleneck_size"
_COLUMNS = f"{_SECOND_COLUMNS}, parts"
# From a version to the next one; what is new has the value that it would have had.
_UPGRADES = {
    1: """
BEGIN IMMEDIATE;
ALTER TABLE adapters ADD COLUMN virtual_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE adapters ADD COLUMN bottleneck_size INTEGER NOT NULL DEFAULT 0;
PRAGMA user_version = 2;
COMMIT;
""",
    2: """
BEGIN IMMEDIATE;
ALTER TABLE adapters ADD COLUMN parts TEXT NOT NULL DEFAULT '[]';
PRAGMA user_version = 3;
COMMIT;
""",
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
            if not path.exists():
                _create(path)
            self._connection = _open(path)
        except StorageFailed as error:
            os.close(self._held)
            raise StartupError(f"{error.message} Choose another data folder, or make this one writable.") from error
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
        with self._lock, _sqlite_errors("Reading the catalogue"):
            rows = self._connection.execute(f"SELECT {_COLUMNS} FROM adapters {rest}", values).fetchall()
        return tuple(_entry(row) for row in rows)

    @contextmanager
    def _changing(self, doing: str) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is on the disk afterwards, or none of it happened."""
        with self._lock, _sqlite_errors(doing):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


def peek(path: Path) -> tuple[CatalogueEntry, ...]:
    """The entries of a catalogue by name, read without holding it, also while a server does; empty when there is none.

    Raises StartupError when the file cannot be used.
    """
    if not path.exists():
        return ()
    connection = _check(path)
    try:
        with _sqlite_errors("Reading the catalogue"):
            rows = connection.execute(f"SELECT {_columns(connection)} FROM adapters ORDER BY name").fetchall()
    finally:
        connection.close()
    return tuple(_entry(row) for row in rows)


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


def _create(path: Path) -> None:
    """Make an empty catalogue under a temporary name, so that no crash leaves half of one in its place."""
    made = path.with_name(path.name + ".new")
    try:
        with disk_errors("Making the catalogue"), _sqlite_errors("Making the catalogue"):
            # A log that outlived its catalogue would be played into the new one.
            for tail in (".new", ".new-journal", "-wal", "-shm"):
                path.with_name(path.name + tail).unlink(missing_ok=True)
            connection = sqlite3.connect(made, isolation_level=None)
            try:
                connection.executescript("BEGIN;" + _SCHEMA + "COMMIT;")
            finally:
                connection.close()
            os.rename(made, path)
            sync(path.parent)
    except StorageFailed as error:
        raise StartupError(f"{error.message} Choose another data folder, or make this one writable.") from error


def _open(path: Path) -> sqlite3.Connection:
    """The catalogue, writable, once it is known to be ours and whole."""
    _check(path).close()
    with _sqlite_errors("Opening the catalogue"):
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        while (version := _version(connection)) in _UPGRADES:
            connection.executescript(_UPGRADES[version])
    return connection


def _check(path: Path) -> sqlite3.Connection:
    """A read-only connection to a catalogue that is ours, whole and of a known version; StartupError otherwise."""
    advice = (
        "It was left as it is: restore it from a backup, or move the whole folder that it lies in away and load the "
        "adapters again."
    )
    if path.stat().st_size == 0:
        raise StartupError(f"The catalogue {path.name} is damaged: it is empty. {advice}")
    # Read-only first: even closing a writable connection could change a file that is not ours.
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5.0)
    try:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        version = _version(connection)
        if application != _APPLICATION_ID:
            raise StartupError(f"{path.name} is a database of another program. {advice}")
        if version > SCHEMA_VERSION:
            raise StartupError(
                f"The catalogue {path.name} was written by a newer version (schema {version}, this one knows "
                f"{SCHEMA_VERSION}). It was left as it is: start the newer version, or use another data folder."
            )
        (state,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if version < 1 or state != "ok":
            raise StartupError(f"The catalogue {path.name} is damaged ({str(state)[:100]}). {advice}")
        for row in connection.execute(f"SELECT {_columns(connection)} FROM adapters"):
            _entry(row)
    except (sqlite3.Error, ValueError, TypeError) as error:
        connection.close()
        raise StartupError(f"The catalogue {path.name} cannot be used ({error}). {advice}") from error
    except StartupError:
        connection.close()
        raise
    return connection


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def _columns(connection: sqlite3.Connection) -> str:
    """What can be selected, also from a catalogue that has not been upgraded."""
    known = {1: f"{_FIRST_COLUMNS}, 0, 0, '[]'", 2: f"{_SECOND_COLUMNS}, '[]'"}
    return known.get(_version(connection), _COLUMNS)


@contextmanager
def _sqlite_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageFailed(f"{doing} failed: {error}.") from error


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
