"""`KeyStore` owns the file of API keys: SQLite, changed by `adaplex keys` alone, read by servers while they run.

A server notices a change within `_PATIENCE`, so that a revoked key is dead a moment later without a restart.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path

from adaplex_adapters.database import Schema, open_database, sqlite_errors
from adaplex_adapters.errors import NotFound
from adaplex_server.caller import Caller, Limits
from adaplex_server.service.access.keys import KeyRecord, new_key

_PATIENCE = 0.5
_SCHEMA = Schema(
    what="The file of API keys",
    application=0x4144504B,  # "ADPK"
    version=1,
    statements="""
    CREATE TABLE keys (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, digest BLOB NOT NULL, verbs TEXT NOT NULL, models TEXT NOT NULL,
        requests INTEGER, tokens INTEGER, streams INTEGER, created REAL NOT NULL, expires REAL, revoked INTEGER NOT NULL
    ) STRICT;
    """,
    advice="restore it from a backup, or move it away and make new keys.",
)
_COLUMNS = "id, name, digest, verbs, models, requests, tokens, streams, created, expires, revoked"


class KeyStore:
    """The keys in the file `path`, for one thread at a time. A file that is not ours or damaged is refused with
    StartupError, never replaced.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._seen: tuple[float, int] = (0.0, -1)
        self._records: Mapping[str, KeyRecord] = {}
        if path.exists():
            self._connection = open_database(self._path, _SCHEMA)

    def records(self, *, fresh: bool = False) -> Mapping[str, KeyRecord]:
        """All keys by id, as of now or at most `_PATIENCE` ago. Raises StorageFailed when they cannot be read."""
        now = time.monotonic()
        if not fresh and now - self._seen[0] < _PATIENCE:
            return self._records
        if self._connection is None:
            if not self._path.exists():
                return self._records
            self._connection = open_database(self._path, _SCHEMA)
        with sqlite_errors("Reading the keys"):
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
            if version != self._seen[1]:
                rows = self._connection.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY created").fetchall()
                self._records = {row[0]: _record(row) for row in rows}
        self._seen = (now, version)
        return self._records

    def create(self, caller: Caller, expires: float | None) -> str:
        """Keep a new key with this caller's name, scope and limits. Returns the key, which nobody can read again."""
        if self._connection is None:
            self._connection = open_database(self._path, _SCHEMA)
        key, public, digest = new_key()
        limits = caller.limits
        values = (
            public, caller.name, digest, json.dumps(sorted(caller.verbs)), json.dumps(caller.models),
            limits.requests, limits.tokens, limits.streams, time.time(), expires, 0,
        )  # fmt: skip
        with sqlite_errors("Keeping the key"):
            self._connection.execute(f"INSERT INTO keys ({_COLUMNS}) VALUES ({', '.join('?' * len(values))})", values)
        self._forget_cache()
        return key

    def revoke(self, public: str) -> None:
        """The key is dead from now on. NotFound when there is none of this id."""
        if self._connection is None or public not in self.records():
            raise NotFound(f"There is no key with the id {public[:40]!a}; `adaplex keys list` shows them.")
        with sqlite_errors("Revoking the key"):
            self._connection.execute("UPDATE keys SET revoked = 1 WHERE id = ?", (public,))
        self._forget_cache()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _forget_cache(self) -> None:
        self._seen = (0.0, -1)


def _record(row: tuple) -> KeyRecord:
    public, name, digest, verbs, models, requests, tokens, streams, created, expires, revoked = row
    caller = Caller(
        public, name, frozenset(json.loads(verbs)), tuple(json.loads(models)), Limits(requests, tokens, streams)
    )
    return KeyRecord(caller, digest, created, expires, bool(revoked))
