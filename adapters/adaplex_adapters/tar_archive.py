"""Tar archives, plain or gzipped. A gzipped one is first unpacked to a file within the limits, then read like any."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO

from adaplex_adapters.archive_limits import ArchiveEntry, UploadLimits
from adaplex_adapters.errors import RequestTooLarge
from adaplex_adapters.problems import refuse, shown

_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20


@contextmanager
def open_tar(archive: Path, scratch: Path, room: int, limits: UploadLimits) -> Iterator[Iterator[ArchiveEntry]]:
    """The entries of a tar or tar.gz archive, one after the other, readable while the context lasts.

    `scratch` is a folder for the unpacked tar, `room` its largest size. Raises InvalidAdapter when it is damaged.
    """
    plain = archive
    unpacked = scratch / "unpacked.tar"
    try:
        with archive.open("rb") as file:
            if file.read(2) == _GZIP:
                plain = unpacked
                _gunzip(archive, unpacked, room)
        with plain.open("rb") as file, tarfile.open(fileobj=_ShortReads(file), mode="r:") as opened:  # type: ignore[call-overload]
            yield (_entry(opened, member) for member in opened)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, RecursionError, OverflowError) as err:
        raise refuse(f"This is not a zip, tar or tar.gz archive, or it is damaged ({shown(str(err))}).") from None
    finally:
        unpacked.unlink(missing_ok=True)


def _gunzip(archive: Path, to: Path, room: int) -> None:
    with gzip.open(archive, "rb") as packed, to.open("xb") as out:
        while piece := packed.read(_CHUNK):
            if out.tell() + len(piece) > room:
                raise RequestTooLarge(f"The archive would expand to more than {room} bytes.", param="files")
            out.write(piece)


class _ShortReads:
    """A file that refuses to read much at once: tarfile reads an extended header whole, at whatever size it states."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        """At most a few chunks."""
        if not 0 <= size <= 4 * _CHUNK:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _entry(opened: tarfile.TarFile, member: tarfile.TarInfo) -> ArchiveEntry:
    return ArchiveEntry(member.name, member.size, member.isdir(), _refused(member), partial(_open, opened, member))


def _open(opened: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    file = opened.extractfile(member)
    assert file is not None, "only regular files are opened"
    return file  # type: ignore[return-value]


def _refused(member: tarfile.TarInfo) -> str | None:
    if member.issym() or member.islnk():
        return "a link"
    if member.issparse():
        return "a sparse file"
    if not (member.isreg() or member.isdir()):
        return "neither a file nor a folder"
    return None
