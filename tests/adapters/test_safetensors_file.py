"""Our reader and writer against the safetensors library, and against headers that lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.safetensors_file import header_length, parse_header, serialize, tensors_in

LIMITS = ReadLimits()
FILE = "x.safetensors"
MIB = 1 << 20


def read(data: bytes) -> dict[str, torch.Tensor]:
    length = header_length(data[:8], len(data), LIMITS, FILE)
    body = torch.frombuffer(bytearray(data[8 + length :]) or bytearray(1), dtype=torch.uint8)
    entries = parse_header(data[8 : 8 + length], len(data) - 8 - length, LIMITS, FILE)
    return tensors_in(body, entries)


def file_with(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


tensor_lists = st.lists(
    st.tuples(
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        st.lists(st.integers(0, 4), max_size=3),
    ),
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(tensor_lists)
def test_reads_and_writes_what_the_library_does(kinds: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = {f"t{n}": torch.randn(shape).to(dtype) for n, (dtype, shape) in enumerate(kinds)}
    ours = b"".join(serialize(tensors))
    for data in (ours, safetensors.torch.save(tensors)):
        found = read(data)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    theirs = safetensors.torch.load(ours)
    assert theirs.keys() == tensors.keys() and all(torch.equal(theirs[n], t) for n, t in tensors.items())


def test_unaligned_tensors_are_read() -> None:
    half, single = torch.tensor([1.5], dtype=torch.float16), torch.tensor([2.5, 3.5])
    data = half.numpy().tobytes() + single.numpy().tobytes()
    found = read(file_with({"h": entry(0, 2, [1], "F16"), "s": entry(2, 10)}, data))
    assert found["h"].item() == 1.5 and found["s"].tolist() == [2.5, 3.5]


LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "short": (b"\0" * 7, "truncated"),
    "header of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "claims 9223372036854775808"),
    "header of 2^64-1": (b"\xff" * 8 + b"{}", "claims"),
    "header over the limit": (struct.pack("<Q", LIMITS.max_header_bytes + 1) + b"{}", "at most"),
    "header beyond the file": (struct.pack("<Q", 100) + b"{}", "truncated"),
    "pickle": (b"\x80\x04\x95" + b"\0" * 40, "claims"),
    "no JSON": (file_with(b"nonsense"), "JSON"),
    "not UTF-8": (file_with(b'{"\xff": 1}'), "UTF-8"),
    "array": (file_with([]), "object"),
    "deep": (file_with(b"[" * 100_000), "nested"),
    "NaN": (file_with(b'{"t": NaN}'), "NaN"),
    "duplicate": (file_with(b'{"t": {}, "t": {}}'), "twice"),
    "entry no object": (file_with({"t": 1}), "exactly"),
    "entry with more": (file_with({"t": {**entry(0, 4), "x": 1}}, b"\0" * 4), "exactly"),
    "metadata no strings": (file_with({"__metadata__": {"a": 1}}), "__metadata__"),
    "name": (file_with({"../t": entry(0, 4)}, b"\0" * 4), "impossible name"),
    "dtype": (file_with({"t": entry(0, 4, [1], "F64")}, b"\0" * 4), "dtype 'F64'"),
    "dtype object": (file_with({"t": entry(0, 4, [1], {"a": 1})}, b"\0" * 4), "dtype"),
    "shape negative": (file_with({"t": entry(0, 4, [-1])}, b"\0" * 4), "shape"),
    "shape bool": (file_with({"t": entry(0, 4, [True])}, b"\0" * 4), "shape"),
    "shape float": (file_with({"t": entry(0, 4, [1.0])}, b"\0" * 4), "shape"),
    "shape huge": (file_with({"t": entry(0, 4, [1 << 40, 1 << 40])}, b"\0" * 4), "takes"),
    "shape of 9": (file_with({"t": entry(0, 4, [1] * 9)}, b"\0" * 4), "shape"),
    "size": (file_with({"t": entry(0, 8, [1])}, b"\0" * 8), "takes 4 bytes, not 8"),
    "offsets three": (file_with({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}), "data_offsets"),
    "offsets reversed": (file_with({"t": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}), "takes"),
    "beyond the data": (file_with({"t": entry(0, 8)}, b"\0" * 4), "truncated or lies"),
    "overlap": (file_with({"t": entry(0, 8), "u": entry(4, 12)}, b"\0" * 12), "overlaps"),
    "same bytes": (file_with({"t": entry(0, 4), "u": entry(0, 4)}, b"\0" * 4), "overlaps"),
    "hole": (file_with({"t": entry(0, 4), "u": entry(8, 12)}, b"\0" * 12), "belong to no tensor"),
    "rest": (file_with({"t": entry(0, 4)}, b"\0" * 8), "after its last tensor"),
    "huge integer": (file_with(b'{"t": ' + b"9" * 6000 + b"}"), "JSON"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(lie: str) -> None:
    data, expected = LIES[lie]
    with pytest.raises(InvalidAdapter, match=expected) as caught:
        read(data)
    assert len(caught.value.message) < 2000 and caught.value.message.isascii()


def test_too_many_tensors() -> None:
    many = {f"t{n}": entry(0, 0, [0]) for n in range(LIMITS.max_tensors + 1)}
    with pytest.raises(InvalidAdapter, match="at most"):
        read(file_with(many))


def test_a_file_of_the_library_on_disk(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16()}
    safetensors.torch.save_file(tensors, tmp_path / FILE)
    found = read((tmp_path / FILE).read_bytes())
    assert all(torch.equal(found[n], tensors[n]) for n in tensors)
