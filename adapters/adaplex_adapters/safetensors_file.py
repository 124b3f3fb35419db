"""The safetensors format, read and written by our own code. Owns nothing; knows nothing of adapters.

Format (github.com/huggingface/safetensors): 8 bytes little-endian length n of the header; n bytes of JSON that map a
tensor's name to {"dtype", "shape", "data_offsets": [begin, end)}, with an optional "__metadata__" of strings; then the
data, which the tensors must cover without holes or overlaps. Only the float types that adapters are trained in are
read.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.problems import raise_if_any, refuse, shown
from adaplex_adapters.strict_json import parse_object

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,512}")
_ALIGN = 8


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header. [begin, end) are bytes within the data that follows the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def header_length(prefix: bytes, file_size: int, limits: ReadLimits, what: str) -> int:
    """Length of the JSON header from the file's first 8 bytes, checked against the file's size and the limits."""
    if len(prefix) < 8 or file_size < 8:
        raise refuse(
            f"{what} is truncated: {file_size} bytes are fewer than the 8 that every safetensors file begins with."
        )
    (length,) = struct.unpack("<Q", prefix[:8])
    if length > limits.max_header_bytes:
        raise refuse(
            f"{what} is not a safetensors file or is hostile: its header claims {length} bytes; at most "
            f"{limits.max_header_bytes} are read."
        )
    if 8 + length > file_size:
        raise refuse(f"{what} is truncated: its header claims {length} bytes, the file has {file_size}.")
    return int(length)


def parse_header(header: bytes, data_size: int, limits: ReadLimits, what: str) -> tuple[TensorEntry, ...]:
    """All tensors of the header in the order of their data. `data_size` is the number of bytes that follow the header.

    Raises InvalidAdapter unless every entry is well-formed and the entries cover the data exactly once.
    """
    fields = parse_object(header, f"the header of {what}")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refuse(f"__metadata__ in {what} must map strings to strings.")
    if len(fields) > limits.max_tensors:
        raise refuse(f"{what} holds {len(fields)} tensors; at most {limits.max_tensors} are read.")
    problems: list[str] = []
    entries = []
    for name, value in fields.items():
        found = _entry(name, value, what)
        if isinstance(found, str):
            problems.append(found)
        else:
            entries.append(found)
    raise_if_any(problems)
    entries.sort(key=lambda e: (e.begin, e.end))
    raise_if_any(list(_layout_problems(entries, data_size, what)))
    return tuple(entries)


def _entry(name: str, value: Any, what: str) -> TensorEntry | str:
    """The entry, or what is wrong with it."""
    if not _NAME.fullmatch(name):
        return f"{what} has a tensor with the impossible name {shown(name)}."
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        return f"Tensor {name} in {what} must have exactly dtype, shape and data_offsets."
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"Tensor {name} has dtype {shown(dtype)}; adapters are read in {', '.join(DTYPES)}."
    if not _counts(shape) or len(shape) > 8:
        return f"Tensor {name} has the impossible shape {shown(shape)}."
    if not _counts(offsets) or len(offsets) != 2:
        return f"Tensor {name} has the impossible data_offsets {shown(offsets)}."
    begin, end = offsets
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != wanted:
        return (
            f"Tensor {name} of shape {shown(shape)} and dtype {dtype} takes {shown(wanted)} bytes, not {end - begin}."
        )
    return TensorEntry(name, DTYPES[dtype], tuple(shape), begin, end)


def _counts(value: Any) -> bool:
    """Whether `value` is a list of integers from 0 to 2^53 - 1 (bool is not an integer here)."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 53 for v in value)


def _layout_problems(entries: list[TensorEntry], data_size: int, what: str) -> Iterator[str]:
    at = 0
    for entry in entries:
        if entry.end > data_size:
            yield (
                f"{what} is truncated or lies: tensor {entry.name} ends at byte {entry.end} of the data, which has "
                f"{data_size} bytes."
            )
        elif entry.begin < at:
            yield f"Tensor {entry.name} in {what} overlaps the one before it."
        elif entry.begin > at:
            yield f"{what} has {entry.begin - at} bytes that belong to no tensor before {entry.name}."
        at = max(at, entry.end)
    if at < data_size:
        yield f"{what} has {data_size - at} bytes after its last tensor."


def tensors_in(data: torch.Tensor, entries: tuple[TensorEntry, ...]) -> dict[str, torch.Tensor]:
    """Views into `data` (uint8, the bytes after the header). A tensor that begins unaligned for its dtype is copied."""
    found = {}
    for entry in entries:
        raw = data[entry.begin : entry.end]
        if raw.storage_offset() % entry.dtype.itemsize or raw.data_ptr() % entry.dtype.itemsize:
            raw = raw.clone()
        found[entry.name] = raw.view(entry.dtype).view(entry.shape)
    return found


def serialize(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    """The bytes of a safetensors file with these CPU tensors in this order, piece by piece, without joining them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    yield memoryview(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        yield tensor_bytes(tensor)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in row-major order (not a copy when it is contiguous)."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
