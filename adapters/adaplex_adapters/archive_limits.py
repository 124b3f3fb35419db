"""What an archive may cost to unpack, and what one entry of it is, whatever its format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO


@dataclass(frozen=True)
class UploadLimits:
    """max_bytes: of everything unpacked. max_entries: in the archive.

    max_ratio, ratio_allowance: unpacked bytes may be max_ratio times the archive's and ratio_allowance more. Trained
    weights hardly compress; a bomb of zeros compresses a thousandfold.
    """

    max_bytes: int = 4 << 30
    max_entries: int = 1_000
    max_ratio: int = 50
    ratio_allowance: int = 16 << 20


@dataclass(frozen=True)
class ArchiveEntry:
    """One entry. size: as the archive states it. refused: why such an entry is never taken ("a link"), or None."""

    name: str
    size: int
    is_folder: bool
    refused: str | None
    open: Callable[[], BinaryIO]
