"""The user's cache folder, and folders in it that are made once: whole or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adaplex_adapters.durable import sync
from adaplex_adapters.errors import StartupError


def cache_root() -> Path:
    """$XDG_CACHE_HOME/adaplex, by default ~/.cache/adaplex. Not created here."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path is to be ignored.
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "adaplex"


def ensure_folder(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made first if it is not there: `make` fills a temporary folder beside it, which is then renamed.

    Two processes at once: the second waits for the first and finds its result. Raises StartupError if the disk refuses.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(f"{target.name}.lock")):
            if not target.is_dir():
                _make(target, make)
    except OSError as error:
        raise StartupError(f"cannot write the cache folder {target}: {error}; set XDG_CACHE_HOME to another") from error
    return target


def _make(target: Path, make: Callable[[Path], None]) -> None:
    prefix = f"{target.name}.part-"
    for left in target.parent.glob(f"{prefix}*"):  # of a process that was killed; the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        make(part)
        part.chmod(0o755)
        for path in (*part.iterdir(), part):
            sync(path)
        part.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by this process until the end of the block, or its death. The file itself stays: removing it would let
    two in.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
