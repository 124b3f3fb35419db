"""Opens SQLite files of ours: made whole or not at all, never replaced, refused when foreign, damaged or newer.

Owns nothing. A connection made here commits each transaction to the disk before it returns (WAL, synchronous=FULL).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from adaplex_adapters.durable import disk_errors, sync
from adaplex_adapters.errors import StartupError, StorageFailed


@dataclass(frozen=True)
class Schema:
    """what: how messages call the file ("The file of API keys"). application: number in its header. statements: make
    the tables of `version`. upgrades: from an older version, statements that make the next one. advice: what to do
    when the file cannot be used. probe: reads what is to be readable; raises ValueError, TypeError or sqlite3.Error.
    """

    what: str
    application: int
    version: int
    statements: str
    advice: str
    upgrades: Mapping[int, str] = field(default_factory=dict)
    probe: Callable[[sqlite3.Connection], object] = field(default=lambda connection: None)


def open_database(path: Path, schema: Schema) -> sqlite3.Connection:
    """The file, made when there is none. For one thread at a time. Raises StartupError."""
    try:
        if not path.exists():
            _create(path, schema)
        read_only(path, schema).close()
        with sqlite_errors(f"Opening {schema.what[0].lower()}{schema.what[1:]}"):
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            while (version := version_of(connection)) in schema.upgrades:
                connection.executescript(
                    f"BEGIN IMMEDIATE; {schema.upgrades[version]} PRAGMA user_version = {version + 1}; COMMIT;"
                )
        return connection
    except StorageFailed as error:
        raise StartupError(f"{error.message} Choose another data folder, or make this one writable.") from error


@contextmanager
def changing(connection: sqlite3.Connection, doing: str) -> Iterator[sqlite3.Connection]:
    """A transaction: all of it is on the disk afterwards, or none of it happened. Raises StorageFailed."""
    with sqlite_errors(doing):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


@contextmanager
def sqlite_errors(doing: str) -> Iterator[None]:
    """What SQLite raises, in words: StorageFailed."""
    try:
        yield
    except sqlite3.Error as error:
        raise StorageFailed(f"{doing} failed: {error}.") from error


def _create(path: Path, schema: Schema) -> None:
    """Under a temporary name first, so that no crash leaves half of one in its place."""
    made = path.with_name(path.name + ".new")
    with disk_errors(f"Making {schema.what}"), sqlite_errors(f"Making {schema.what}"):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A log that outlived its file would be played into the new one.
        for tail in (".new", ".new-journal", "-wal", "-shm"):
            path.with_name(path.name + tail).unlink(missing_ok=True)
        os.close(os.open(made, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(made, isolation_level=None)
        try:
            connection.executescript(
                f"BEGIN; {schema.statements} PRAGMA application_id = {schema.application}; "
                f"PRAGMA user_version = {schema.version}; COMMIT;"
            )
        finally:
            connection.close()
        os.rename(made, path)
        sync(path.parent)


def read_only(path: Path, schema: Schema) -> sqlite3.Connection:
    """A connection that cannot write, to a file that is ours, whole, and of this version or one that can be upgraded;
    also while somebody else writes. Raises StartupError; the file is left as it is, since even closing a writable
    connection could change one that is not ours.
    """
    advice = f"It was left as it is: {schema.advice}"
    if path.stat().st_size == 0:
        raise StartupError(f"{schema.what} {path.name} is damaged: it is empty. {advice}")
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5.0)
    try:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        version = version_of(connection)
        if application != schema.application:
            raise StartupError(f"{path.name} is a database of another program. {advice}")
        if version > schema.version:
            raise StartupError(
                f"{schema.what} {path.name} was written by a newer version (schema {version}, this one knows "
                f"{schema.version}). It was left as it is: start the newer version, or use another data folder."
            )
        (state,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if state != "ok" or version not in (schema.version, *schema.upgrades):
            raise StartupError(f"{schema.what} {path.name} is damaged ({str(state)[:100]}). {advice}")
        schema.probe(connection)
    except (sqlite3.Error, ValueError, TypeError) as error:
        connection.close()
        raise StartupError(f"{schema.what} {path.name} cannot be used ({error}). {advice}") from error
    except StartupError:
        connection.close()
        raise
    return connection


def version_of(connection: sqlite3.Connection) -> int:
    """Of the file's tables."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)
