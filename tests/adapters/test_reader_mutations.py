"""Hundreds of deterministic mutations of a good folder: each is refused with InvalidAdapter or read with finite values.

Never another exception, never a hang, and never an adapter that claims to be the original while its content differs.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.reader import read_adapter
from adaplex_adapters.spec import LoraAdapter

ROUNDS = 400


def same(one: LoraAdapter, other: LoraAdapter) -> bool:
    return one.modules.keys() == other.modules.keys() and all(
        module.scaling == other.modules[path].scaling
        and torch.equal(module.a, other.modules[path].a)
        and torch.equal(module.b, other.modules[path].b)
        for path, module in one.modules.items()
    )


def mutations(data: bytes, rng: random.Random) -> Iterator[bytes]:
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
    one, other = rng.sample(names, 2)
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


def try_read(folder: Path, base: BaseShape) -> LoraAdapter | None:
    try:
        found = read_adapter(folder, base)
    except InvalidAdapter as error:
        assert error.message.isascii() and len(error.message) < 6000
        return None
    for module in found.modules.values():
        assert torch.isfinite(module.a).all() and torch.isfinite(module.b).all()
    return found


@pytest.mark.timeout(120)
def test_mutated_tensor_files(write_lora: Any, base: BaseShape) -> None:
    folder = write_lora()
    original = read_adapter(folder, base)
    file = folder / "adapter_model.safetensors"
    good = file.read_bytes()
    refused = 0
    source = mutations(good, random.Random(7))
    for _ in range(ROUNDS):
        file.write_bytes(next(source))
        found = try_read(folder, base)
        refused += found is None
        if found is not None:
            assert same(found, original) == (found.spec.revision == original.spec.revision)
    assert refused > ROUNDS // 2


@pytest.mark.timeout(120)
def test_mutated_configs(write_lora: Any, base: BaseShape) -> None:
    folder = write_lora(config={"rank_pattern": {"v_proj": 4}, "alpha_pattern": {r".*\.1\..*": 3}, "use_rslora": True})
    original = read_adapter(folder, base)
    file = folder / "adapter_config.json"
    good = file.read_bytes()
    rng = random.Random(11)
    accepted = 0
    for _ in range(ROUNDS):
        at = rng.randrange(len(good))
        cut = rng.randrange(1, 6)
        file.write_bytes(
            rng.choice(
                [
                    good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :],
                    good[:at] + good[at + cut :],
                    good[:at]
                    + rng.choice([b"0", b"9", b".", b"*", b"(", b"]", b'"', b"-", b"null", b"\\"])
                    + good[at:],
                    good[:at],
                ]
            )
        )
        found = try_read(folder, base)
        if found is not None:
            accepted += 1
            assert same(found, original) == (found.spec.revision == original.spec.revision)
    assert 0 < accepted < ROUNDS // 2
