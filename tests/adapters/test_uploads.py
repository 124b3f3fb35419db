"""Archives: an adapter comes out, or a clear refusal; never a file outside, never more than the limits."""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.errors import InvalidAdapter, InvalidRequest, RequestTooLarge, StorageFailed
from adaplex_adapters.reader import read_adapter
from adaplex_adapters.uploads import UploadLimits, unpack_archive

GOOD = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"\0" * 100}
Entries = list[tuple[str, bytes]]


def make_zip(path: Path, entries: Entries, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", options.pop("compression", zipfile.ZIP_DEFLATED)) as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name) if name.endswith("/") else name, data)
    return path


def make_tar(path: Path, entries: Entries, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def make_tar_gz(path: Path, entries: Entries) -> Path:
    return make_tar(path, entries, "w:gz")


MAKERS = [make_zip, make_tar, make_tar_gz]
Maker = Callable[[Path, Entries], Path]


def unpack(archive: Path, limits: UploadLimits = UploadLimits()) -> dict[str, bytes]:  # noqa: B008
    """File name -> content; nothing but the archive and the folder may be beside it."""
    folder = archive.parent / "unpacked"
    before = set(archive.parent.iterdir())
    try:
        unpack_archive(archive, folder, limits)
    finally:
        assert set(archive.parent.iterdir()) <= before | {folder}
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("prefix", ["", "my-adapter/", "./"])
def test_unpacks(make: Maker, prefix: str, tmp_path: Path) -> None:
    extras = [("README.md", b"hi"), ("tokenizer.json", b"{}"), ("training_args.bin", b"pickle"), (".DS_Store", b"x")]
    entries = [(prefix + name, data) for name, data in [*GOOD.items(), *extras]]
    if prefix == "my-adapter/":
        entries = [("my-adapter/", b""), *entries, ("__MACOSX/my-adapter/._adapter_config.json", b"x")]
        entries += [("my-adapter/runs/events.txt", b"x")]
    assert unpack(make(tmp_path / "a", entries)) == GOOD


@pytest.mark.parametrize("make", MAKERS)
def test_a_real_adapter(make: Maker, write_lora: Any, base: BaseShape, tmp_path: Path) -> None:
    folder = write_lora()
    staging = tmp_path / "staging"
    staging.mkdir()
    archive = make(staging / "upload", [(f"x/{path.name}", path.read_bytes()) for path in folder.iterdir()])
    unpack_archive(archive, staging / "adapter")
    assert read_adapter(staging / "adapter", base).spec == read_adapter(folder, base).spec


TRICKS: dict[str, tuple[str, str]] = {
    "absolute": ("/etc/passwd", "leave the folder"),
    "parent": ("../evil", "leave the folder"),
    "parent inside": ("a/../../evil", "leave the folder"),
    "backslash": ("..\\evil", "impossible name"),
    "drive": ("C:evil", "impossible name"),
    "control": ("a\x1b[31m", "impossible name"),
    "newline": ("a\nb", "impossible name"),
    "long": ("x" * 600, "impossible name"),
    "case": ("Adapter_Config.json", "same name|lower case"),
    "case of another": ("readme.MD", "same name"),
    "unicode case": ("README.ｍd", "same name"),
    "pickle": ("adapter_model.bin", "pickle"),
    "pickle deep": ("x/y/z/evil.pkl", "pickle"),
    "other weights": ("model.safetensors", "unused"),
    "second adapter": ("other/adapter_config.json", "several folders"),
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_are_refused(trick: str, make: Maker, tmp_path: Path) -> None:
    name, message = TRICKS[trick]
    staging = tmp_path / "staging"
    staging.mkdir()
    archive = make(staging / "a", [*GOOD.items(), ("README.md", b""), (name, b"evil")])
    with pytest.raises(InvalidAdapter, match=message) as caught:
        unpack(archive)
    assert caught.value.message.isascii() and caught.value.message.isprintable()
    assert list(tmp_path.iterdir()) == [staging] and list(staging.iterdir()) == [archive]


@pytest.mark.parametrize("make", MAKERS)
def test_shapes_of_archives(make: Maker, tmp_path: Path) -> None:
    for number, (entries, message) in enumerate(
        [
            ([], "holds no adapter_config|not a zip"),
            ([("README.md", b"")], "holds no adapter_config"),
            ([(f"a/b/{name}", data) for name, data in GOOD.items()], "too deep"),
            ([*GOOD.items(), *GOOD.items()], "same name"),
        ]
    ):
        with pytest.raises(InvalidAdapter, match=message):
            unpack(make(tmp_path / str(number), entries))


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE", "CONTTYPE"])
@pytest.mark.parametrize("name", ["adapter_config.json", "README.md"])
def test_tar_links_and_devices(kind: str, name: str, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [item for item in GOOD.items() if item[0] != name])
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = getattr(tarfile, kind), "/etc/passwd"
        archive.addfile(info)
    if kind == "CONTTYPE":  # "contiguous" is a regular file
        assert unpack(path).keys() == GOOD.keys() | ({name} & GOOD.keys())
        return
    with pytest.raises(InvalidAdapter, match="is a link" if "LNK" in kind or "SYM" in kind else "neither a file"):
        unpack(path)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_zip_links_and_devices(kind: int, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", list(GOOD.items()))
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("README.md")
        info.external_attr = (kind | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(InvalidAdapter, match="is a link" if kind == stat.S_IFLNK else "neither a file"):
        unpack(path)


def test_zip_names_are_not_cut_at_nul(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", [*GOOD.items(), ("READMEx.txt", b"")])
    path.write_bytes(path.read_bytes().replace(b"READMEx.txt", b"README\0.txt"))
    with pytest.raises(InvalidAdapter, match=r"impossible name|damaged"):
        unpack(path)


def test_zip_methods(tmp_path: Path) -> None:
    for compression in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with pytest.raises(InvalidAdapter, match="use deflate"):
            unpack(make_zip(tmp_path / str(compression), list(GOOD.items()), compression=compression))
    stored = make_zip(tmp_path / "stored", list(GOOD.items()), compression=zipfile.ZIP_STORED)
    data = bytearray(stored.read_bytes())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + at] |= 1  # the flag of an encrypted entry
    (tmp_path / "locked").write_bytes(data)
    with pytest.raises(InvalidAdapter, match="encrypted"):
        unpack(tmp_path / "locked")


@pytest.mark.parametrize("make", [make_zip, make_tar_gz])
def test_bombs(make: Maker, tmp_path: Path) -> None:
    bomb = make(tmp_path / "bomb", [("adapter_config.json", b"{}"), ("adapter_model.safetensors", bytes(40 << 20))])
    assert bomb.stat().st_size < 100_000
    with pytest.raises(RequestTooLarge, match="expand"):
        unpack(bomb)


def test_a_bomb_in_what_is_not_kept(tmp_path: Path) -> None:
    """A zip's ignored entries are never unpacked, a tar.gz's must be, to get past them."""
    entries = [*GOOD.items(), ("README.md", bytes(40 << 20))]
    with pytest.raises(RequestTooLarge, match="expand"):
        unpack(make_tar_gz(tmp_path / "bomb", entries))
    assert unpack(make_zip(tmp_path / "zip", entries)) == GOOD


@pytest.mark.parametrize("make", MAKERS)
def test_limits(make: Maker, tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(100_000)
    large = make(tmp_path / "large", [("adapter_config.json", b"{}"), ("adapter_model.safetensors", noise)])
    with pytest.raises(RequestTooLarge, match="50000"):
        unpack(large, UploadLimits(max_bytes=50_000))
    many = make(tmp_path / "many", [*GOOD.items(), *((f"f{number}", b"") for number in range(2000))])
    with pytest.raises(InvalidRequest, match="1000"):
        unpack(many)


def test_a_zip_that_lies_about_sizes(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", [*GOOD.items(), ("README.md", b"")])
    data = path.read_bytes()
    for lie in (10, 101, 1 << 31, 0xFFFFFFFF):
        path.write_bytes(data.replace(struct.pack("<I", 100), struct.pack("<I", lie)))
        with pytest.raises(InvalidRequest):
            unpack(path)
        for leftover in (tmp_path / "unpacked").glob("*"):
            assert leftover.stat().st_size <= 100
            leftover.unlink()
        if (tmp_path / "unpacked").exists():
            (tmp_path / "unpacked").rmdir()


def test_a_tar_header_that_would_fill_the_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 300 << 20
    raw = info.tobuf(tarfile.USTAR_FORMAT)
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(301 << 20)
    with pytest.raises(InvalidAdapter, match="a header of 314572800 bytes"):
        unpack(path)


def test_a_chain_of_tar_headers(tmp_path: Path) -> None:
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1
    path = tmp_path / "a.tar"
    path.write_bytes((info.tobuf(tarfile.GNU_FORMAT) + b"x" + bytes(511)) * 3000)
    with pytest.raises(InvalidAdapter):
        unpack(path)


@pytest.mark.parametrize(
    "data", [b"", b"PK", b"PK\x03\x04", b"\x1f\x8b", b"\x1f\x8b\x08\0" + b"x" * 50, b"x" * 2000, bytes(10240)]
)
def test_what_is_no_archive(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    with pytest.raises(InvalidAdapter):
        unpack(path)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.timeout(60)
def test_mutated_archives(make: Maker, tmp_path: Path) -> None:
    """Whatever is changed: refused, or the files of the right names, and no other error."""
    rng = random.Random(5)
    good = make(tmp_path / "good", [*GOOD.items(), ("README.md", b"hello")]).read_bytes()
    for number in range(150):
        at, staging = rng.randrange(len(good)), tmp_path / f"s{number}"
        staging.mkdir()
        data = [good[:at], good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :]][number % 3 > 0]
        (staging / "a").write_bytes(data)
        with contextlib.suppress(InvalidAdapter, RequestTooLarge):
            assert unpack(staging / "a").keys() <= GOOD.keys()


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_zip(tmp_path / "a.zip", list(GOOD.items()))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageFailed, match="full"):
        unpack(archive)


def test_gzip_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"hello"))
    with pytest.raises(InvalidAdapter, match="not a zip, tar"):
        unpack(tmp_path / "a.tar.gz")
