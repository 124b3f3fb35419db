"""Opening the files of an adapter's folder: regular ones only, each read once; pickles are never opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import torch

from adaplex_adapters.errors import NotFound, StorageFailed
from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.peft_fields import CONFIG_FILE
from adaplex_adapters.problems import refuse, shown
from adaplex_adapters.safetensors_file import TensorEntry, header_length, parse_header, tensors_in

TENSOR_FILE = "adapter_model.safetensors"
LIBRARY_FILE = "adapter.safetensors"
"""What the `adapters` library calls the weights."""
WEIGHT_FILES = (TENSOR_FILE, LIBRARY_FILE)
KEPT_FILES = (CONFIG_FILE, *WEIGHT_FILES)
_PICKLES = frozenset(
    (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".dill", ".msgpack", ".h5")
)
# What the Hugging Face trainer leaves beside an adapter; none of it is ever opened.
_TRAINER_LEFTOVERS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state")


def file_problem(name: str) -> str | None:
    """What is wrong with a file of this name in an adapter (None: it is read, or ignored without being opened)."""
    lower = name.lower()
    suffix = PurePath(lower).suffix
    if suffix in _PICKLES and not lower.startswith(_TRAINER_LEFTOVERS):
        return f"{shown(name)} may be a pickle, which could run code; it was not opened. Save weights as {TENSOR_FILE}."
    if lower.endswith((".safetensors", ".safetensors.index.json")) and name not in WEIGHT_FILES:
        return f"{shown(name)} would stay unused: the weights of an adapter are one file, {TENSOR_FILE}."
    if lower in KEPT_FILES and name not in KEPT_FILES:
        return f"{shown(name)} must be written in lower case."
    return None


class AdapterFolder:
    """One open folder. Files are opened relative to its descriptor, so that it cannot be exchanged meanwhile."""

    def __init__(self, descriptor: int, limits: ReadLimits) -> None:
        self._descriptor = descriptor
        self._limits = limits

    def check(self) -> tuple[tuple[str, ...], list[str]]:
        """(those of KEPT_FILES that can be read, everything that is wrong with the folder)."""
        problems: list[str] = []
        regular, names = set(), set()
        with os.scandir(self._descriptor) as entries:
            for count, entry in enumerate(entries, 1):
                if count > self._limits.max_files:
                    raise refuse(f"The folder holds more than {self._limits.max_files} files.")
                names.add(entry.name)
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISREG(mode):
                    regular.add(entry.name)
                    problems.extend(p for p in [file_problem(entry.name)] if p)
                elif not stat.S_ISDIR(mode) or entry.name in KEPT_FILES:
                    problems.append(
                        f"{shown(entry.name)} is {_kind(mode)}; an adapter's folder may hold regular files only."
                    )
        if CONFIG_FILE not in names:
            problems.append(f"{CONFIG_FILE} is missing.")
        if not names & set(WEIGHT_FILES):
            problems.append(f"{TENSOR_FILE} is missing.")
        if names.issuperset(WEIGHT_FILES):
            problems.append(f"The folder holds both {TENSOR_FILE} and {LIBRARY_FILE}; one of them would stay unused.")
        return tuple(name for name in KEPT_FILES if name in regular), problems

    def read_config(self) -> bytes:
        """The bytes of adapter_config.json."""
        with self._open(CONFIG_FILE) as (file, size):
            if size > self._limits.max_config_bytes:
                raise refuse(f"{CONFIG_FILE} has {size} bytes; at most {self._limits.max_config_bytes} are read.")
            data = bytearray(size)
            _fill(file, memoryview(data), CONFIG_FILE)
            return bytes(data)

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Every tensor of this one of WEIGHT_FILES, in memory of its own."""
        with self._open(name) as (file, size):
            if size > self._limits.max_file_bytes:
                raise refuse(f"{name} has {size} bytes; at most {self._limits.max_file_bytes} are read.")
            prefix = bytearray(min(8, size))
            _fill(file, memoryview(prefix), name)
            header = bytearray(header_length(bytes(prefix), size, self._limits, name))
            _fill(file, memoryview(header), name)
            data_size = size - 8 - len(header)
            entries: tuple[TensorEntry, ...] = parse_header(bytes(header), data_size, self._limits, name)
            data = torch.empty(data_size, dtype=torch.uint8)
            _fill(file, data.numpy().data, name)
        return tensors_in(data, entries)

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[int, int]]:
        """The descriptor and size of a regular file; refuses it when it changed while it was read."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(name, flags, dir_fd=self._descriptor)
        try:
            before = os.fstat(file)
            if not stat.S_ISREG(before.st_mode):
                raise refuse(f"{name} is {_kind(before.st_mode)}, not a regular file.")
            yield file, before.st_size
            after = os.fstat(file)
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise refuse(f"{name} changed while it was read; try again when nobody writes to it.")
        finally:
            os.close(file)


@contextmanager
def open_folder(folder: Path, limits: ReadLimits) -> Iterator[AdapterFolder]:
    """The folder, open. NotFound when there is none, StorageFailed when the system refuses to read it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"There is no adapter folder {shown(folder.name)}.") from None
    except OSError as error:
        raise StorageFailed(f"The adapter folder {shown(folder.name)} cannot be opened: {error.strerror}.") from error
    try:
        yield AdapterFolder(descriptor, limits)
    except FileNotFoundError as error:
        raise refuse(f"{shown(error.filename)} went away while the folder was read.") from None
    except OSError as error:
        raise StorageFailed(f"The adapter folder {shown(folder.name)} cannot be read: {error.strerror}.") from error
    finally:
        os.close(descriptor)


def _fill(file: int, into: memoryview, name: str) -> None:
    at = 0
    while at < len(into):
        got = os.readv(file, [into[at : at + (64 << 20)]])
        if got == 0:
            raise refuse(f"{name} became shorter while it was read; try again when nobody writes to it.")
        at += got


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISLNK, "a link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((text for test, text in kinds if test(mode)), "a device")
