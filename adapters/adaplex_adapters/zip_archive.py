"""Zip archives, as far as an adapter needs them: stored or deflated, not encrypted, without the 64-bit directory."""

from __future__ import annotations

import errno
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from adaplex_adapters.archive_limits import ArchiveEntry, UploadLimits
from adaplex_adapters.problems import refuse, shown

_END = b"PK\x05\x06"
_END_SIZE = 22
_END_64_LOCATOR = b"PK\x06\x07"
_ENTRY_BYTES = 2_000  # generous for one entry of the directory


@contextmanager
def open_zip(archive: Path, scratch: Path, room: int, limits: UploadLimits) -> Iterator[list[ArchiveEntry]]:
    """The entries of a zip archive, readable while the context lasts. Raises InvalidAdapter when it is damaged."""
    try:
        with archive.open("rb") as file:
            _check_directory(file, limits)
            with zipfile.ZipFile(file) as opened:
                yield [_entry(opened, info) for info in opened.infolist()]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise refuse(f"The zip archive is damaged ({shown(str(error))}).") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # a seek to before the file's begin: the archive's own numbers lie
            raise
        raise refuse("The zip archive is damaged (its directory points outside).") from None


def _check_directory(file: BinaryIO, limits: UploadLimits) -> None:
    """Refuse a directory that would take much memory: zipfile reads all of it before it can be asked anything."""
    size = file.seek(0, 2)
    start = file.seek(max(0, size - _END_SIZE - 0xFFFF - 20))
    tail = file.read(size - start)
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < _END_SIZE:
        raise refuse("The zip archive is truncated: its directory is missing.")
    directory = int.from_bytes(tail[at + 12 : at + 16], "little")
    count = int.from_bytes(tail[at + 10 : at + 12], "little")
    if _END_64_LOCATOR in tail or count > limits.max_entries or directory > limits.max_entries * _ENTRY_BYTES:
        raise refuse(f"The zip archive's directory is too large; an adapter has at most {limits.max_entries} entries.")
    file.seek(0)


def _entry(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> ArchiveEntry:
    name = info.orig_filename.replace(
        "\0", "\ufffd\n"
    )  # zipfile cuts names at NUL; make such a name impossible instead
    return ArchiveEntry(name, info.file_size, info.is_dir(), _refused(info), partial(_open, opened, info))


def _open(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> BinaryIO:
    return opened.open(info)  # type: ignore[return-value]


def _refused(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "a link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "neither a file nor a folder"
    if info.flag_bits & 0x41:
        return "encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "compressed in a way that is not read here (use deflate)"
    return None
