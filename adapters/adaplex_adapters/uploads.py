"""Unpacking an uploaded archive of one adapter into a folder that the reader can be given. Owns nothing.

Taken: zip, tar and tar.gz with the files of one PEFT folder, at the top or in one folder. Only the two files that make
an adapter are written, under their known names, so no name from an archive ever becomes a path. Links, devices, `..`,
absolute names, names that differ in case only, pickles and bombs are refused, even in entries that would not be
written.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from adaplex_adapters.archive_limits import ArchiveEntry, UploadLimits
from adaplex_adapters.durable import disk_errors
from adaplex_adapters.errors import RequestTooLarge
from adaplex_adapters.folder import KEPT_FILES, file_problem
from adaplex_adapters.peft_config import CONFIG_FILE
from adaplex_adapters.problems import raise_if_any, refuse, shown
from adaplex_adapters.tar_archive import open_tar
from adaplex_adapters.zip_archive import open_zip

__all__ = ["UploadLimits", "unpack_archive"]
_CHUNK = 1 << 20


def unpack_archive(archive: Path, folder: Path, limits: UploadLimits = UploadLimits()) -> None:  # noqa: B008 (frozen)
    """Write an adapter's config and weights (`folder.KEPT_FILES`) from `archive` into `folder`, which is made here.

    Raises InvalidAdapter for what is refused (nothing is written then), RequestTooLarge over a limit, StorageFailed.
    """
    with disk_errors("Unpacking the upload"):
        size = archive.stat().st_size
        with archive.open("rb") as file:
            start = file.read(512)
        room = min(limits.max_bytes, limits.max_ratio * size + limits.ratio_allowance)
        opener = open_zip if start.startswith(b"PK") else open_tar
        with opener(archive, folder.parent, room, limits) as entries:
            kept = _plan(entries, limits)
            if sum(entry.size for entry in kept.values()) > room:
                raise _too_large(room)
            folder.mkdir(mode=0o700)
            for name, entry in kept.items():
                with (folder / name).open("xb") as out:
                    _copy(entry, out)


def _plan(entries: Iterable[ArchiveEntry], limits: UploadLimits) -> dict[str, ArchiveEntry]:
    """File name -> the entry to write it from."""
    problems: list[str] = []
    seen: dict[str, str] = {}
    files: dict[PurePosixPath, ArchiveEntry] = {}
    for count, entry in enumerate(entries, 1):
        if count > limits.max_entries:
            raise RequestTooLarge(f"The archive has more than {limits.max_entries} entries.", param="files")
        problem = _name_problem(entry.name) or (f"{shown(entry.name)} is {entry.refused}." if entry.refused else None)
        path = PurePosixPath(entry.name)
        if problem is None and not entry.is_folder:
            folded = unicodedata.normalize("NFKC", str(path)).casefold()
            if folded in seen:
                problem = f"{shown(seen[folded])} and {shown(entry.name)} are the same name on some systems."
            seen[folded] = entry.name
            if not _noise(path):
                files[path] = entry
                problem = problem or file_problem(path.name)
        problems.extend([problem] if problem else [])
    raise_if_any(problems)
    return _adapter_among(files)


def _adapter_among(files: dict[PurePosixPath, ArchiveEntry]) -> dict[str, ArchiveEntry]:
    folders = {path.parent for path in files if path.name in KEPT_FILES}
    if not folders:
        raise refuse(f"The archive holds no {CONFIG_FILE}.")
    if len(folders) > 1:
        raise refuse("The archive holds adapter files in several folders; send one adapter an archive.")
    root = folders.pop()
    if len(root.parts) > 1:
        raise refuse("The adapter lies too deep in the archive: put its files at the top, or in one folder.")
    return {name: files[root / name] for name in KEPT_FILES if root / name in files}


def _name_problem(name: str) -> str | None:
    """What is wrong with the name of an entry, whether it would be written or not."""
    parts = name.rstrip("/").split("/")
    if len(name) > 500 or not name.isprintable() or "\\" in name or ":" in parts[0]:
        return f"An entry of the archive has the impossible name {shown(name)}."
    if name.startswith("/") or ".." in parts or not parts[-1]:
        return f"The entry {shown(name)} would leave the folder; an archive may hold plain relative names only."
    return None


def _noise(path: PurePosixPath) -> bool:
    """What macOS adds to archives."""
    return path.parts[0] == "__MACOSX" or path.name.startswith("._") or path.name == ".DS_Store"


def _copy(entry: ArchiveEntry, out: BinaryIO) -> None:
    """At most the stated size is written, whatever the packed data would expand to."""
    left = entry.size
    with entry.open() as source:
        while piece := source.read(_CHUNK):
            left -= len(piece)
            if left < 0:
                raise refuse(f"{shown(entry.name)} is larger than the archive says.")
            out.write(piece)
    if left:
        raise refuse(f"{shown(entry.name)} is shorter than the archive says.")


def _too_large(room: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"The archive would expand to more than {room} bytes, which is the most it may.", param="files"
    )
