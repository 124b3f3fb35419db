"""Files of ours are made whole, and others are left alone."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from adaplex_adapters.database import Schema, changing, open_database
from adaplex_adapters.errors import StartupError, StorageFailed

SCHEMA = Schema("The file of tests", 0x54455354, 1, "CREATE TABLE t (x INTEGER) STRICT;", "make a new one.")


def test_what_is_committed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "t.sqlite3"
    connection = open_database(file, SCHEMA)
    with changing(connection, "Adding"):
        connection.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(StorageFailed, match="Adding failed"), changing(connection, "Adding"):
        connection.execute("INSERT INTO t VALUES (2)")
        connection.execute("INSERT INTO nowhere VALUES (3)")
    connection.close()
    assert open_database(file, SCHEMA).execute("SELECT x FROM t").fetchall() == [(1,)]
    assert file.stat().st_mode & 0o77 == 0


@pytest.mark.parametrize("content", [b"", b"text" * 500])
def test_damaged_files_are_kept(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "t.sqlite3"
    file.write_bytes(content)
    with pytest.raises(StartupError, match="make a new one"):
        open_database(file, SCHEMA)
    assert file.read_bytes() == content


def test_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.sqlite3"
    open_database(file, replace(SCHEMA, version=2)).close()
    with pytest.raises(StartupError, match="newer version"):
        open_database(file, SCHEMA)
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA application_id = 5")
    with pytest.raises(StartupError, match="another program"):
        open_database(file, SCHEMA)


def test_a_log_that_outlived_its_file_is_not_played(tmp_path: Path) -> None:
    file = tmp_path / "t.sqlite3"
    (tmp_path / "t.sqlite3-wal").write_bytes(b"old" * 100)
    assert open_database(file, SCHEMA).execute("SELECT count(*) FROM t").fetchone() == (0,)
