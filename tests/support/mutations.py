"""Hostile variants of an adapter's files, from a seed: what bad disks, bad networks and bad people make of them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from typing import Any

import torch

from adaplex_adapters.spec import Adapter

_LIES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    100_000,
    2**70,
    0.5,
    -2.5,
    1e308,
    1e-308,
    "",
    "x",
    "q_proj",
    "all-linear",
    ".*",
    r"(?:(?:.?){9999}){9999}!",
    r"((.*)*)*!",
    "(" * 500,
    "A" * 5000,
    "\x00\x1b[31m",
    "../../etc/passwd",
    [],
    {},
    [1],
    ["q_proj", "q_proj"],
    [[[]]],
    {"q_proj": 3},
    {"default": 0},
    [True, False],
)


def tensor_mutations(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """Endless: bit flips, cuts, growth, and numbers or parts of the header exchanged."""
    (length,) = struct.unpack("<Q", data[:8])
    while True:
        at = rng.randrange(len(data))
        early = rng.randrange(8 + length)
        yield data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        yield data[:early] + bytes([data[early] ^ (1 << rng.randrange(8))]) + data[early + 1 :]
        yield data[:early] + bytes([rng.randrange(256)]) + data[early + 1 :]
        yield data[:at]
        yield data + bytes(rng.randrange(1, 64))
        yield data[:early] + data[early + rng.randrange(1, 20) :]
        yield struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, length * 2, 1 << 40, 1 << 63])) + data[8:]
        yield _with_header(data, rng)


def _with_header(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.choice(names), rng.choice(names)
    choice = rng.randrange(7)
    if choice == 0:
        header[one]["data_offsets"] = header[other]["data_offsets"]
    elif choice == 1:
        header[one], header[other] = header[other], header[one]
    elif choice == 2:
        header[one]["shape"] = header[one]["shape"][::-1]
    elif choice == 3:
        header[one]["dtype"] = rng.choice(["F16", "BF16", "F64", "I32", "U8"])
    elif choice == 4:
        header[one + rng.choice("x.0")] = header.pop(one)
    elif choice == 5:
        header[one]["data_offsets"] = [value + rng.choice([-4, 4, 1 << 32]) for value in header[one]["data_offsets"]]
    else:
        del header[one]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def config_mutations(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """Endless: bits and characters changed, and fields that lie, are gone, are twice or are of another kind."""
    while True:
        at, cut = rng.randrange(len(data)), rng.randrange(1, 6)
        yield data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        yield data[:at] + data[at + cut :]
        yield data[:at] + rng.choice([b"0", b"9", b".", b"*", b"(", b"]", b'"', b"-", b"null", b"NaN"]) + data[at:]
        yield _with_lie(data, rng)
        yield _with_lie(data, rng)
        yield _with_lie(data, rng)
        yield _twice_or_deep(data, rng)


def _with_lie(data: bytes, rng: random.Random) -> bytes:
    fields: dict[str, Any] = json.loads(data)
    inner = [fields, *(value for value in fields.values() if isinstance(value, dict) and value)]
    chosen = rng.choice(inner)
    key = rng.choice(list(chosen))
    if rng.random() < 0.15:
        del chosen[key]
    elif rng.random() < 0.1:
        chosen["peft_type"] = rng.choice(["LORA", "IA3", "PREFIX_TUNING", "P_TUNING", "VERA", "ADALORA", "OFT", "LOHA"])
    else:
        chosen[key] = rng.choice(_LIES)
    return json.dumps(fields).encode()


def _twice_or_deep(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return data.rstrip()[:-1] + b", " + data.strip()[1:]
    depth = rng.choice([5, 50, 5000, 200_000])
    return data.rstrip()[:-1] + b', "x": ' + b"[" * depth + b"]" * depth + b"}"


def same_content(one: Adapter, other: Adapter) -> bool:
    """Whether the two do the same to the last bit."""
    mine, theirs = list(one.tensors()), list(other.tensors())
    if [name for name, _ in mine] != [name for name, _ in theirs]:
        return False
    for (_, left), (_, right) in zip(mine, theirs, strict=True):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        if not torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)):
            return False
    return _beside_tensors(one) == _beside_tensors(other)


def _beside_tensors(adapter: Adapter) -> Any:
    return (
        {path: (module.scaling, module.embedding) for path, module in adapter.modules.items()},
        {path: scale.on for path, scale in adapter.scales.items()},
        {at: (found.activation, found.reads) for at, found in adapter.bottlenecks.items()},
    )
