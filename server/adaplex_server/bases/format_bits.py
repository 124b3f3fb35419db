"""How many bits each format keeps for a parameter of a linear, scales and all, in a checkpoint and on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaplex_server.model.config import ModelConfig
from adaplex_server.model.formats.quantization import BLOCK, Quantization

_NESTED_GROUP = 256


@dataclass(frozen=True)
class FormatBits:
    """name: of the format, as a base has it. stored: bits a parameter in bitsandbytes', GPTQ's or AWQ's own form;
    device: as our kernels keep it on a GPU. single, double: stored without and with double quantization, None where
    there is no such choice.
    """

    name: str
    stored: float
    device: float
    single: float | None = None
    double: float | None = None


def format_bits(name: str, config: ModelConfig, quantization: Quantization, dtype_bits: int) -> FormatBits:
    """name: as `model.formats.choice` tells it for the checkpoint. dtype_bits: of the activations."""
    given = config.quantization
    if name.startswith(("nf4", "fp4")):
        block = quantization.block if given is None else int(given.get("bnb_4bit_blocksize", BLOCK))
        return _four_bits(name, block)
    if name.startswith(("gptq", "awq")):
        return _grouped(name, given or {}, config)
    if name.startswith("int8"):
        per_row = 32 + (16 if name == "int8-zeropoint" else 0)
        bits = 8 + per_row / config.hidden_size
        return FormatBits(name, bits, bits)
    return FormatBits(name, dtype_bits, dtype_bits)


def _four_bits(name: str, block: int) -> FormatBits:
    """Double quantization keeps absmax in eight bits, and one float32 for 256 of them. Our kernel keeps it in sixteen
    bits either way.
    """
    single, double = 4 + 32 / block, 4 + 8 / block + 32 / (block * _NESTED_GROUP)
    return FormatBits(name, double if name.endswith("-double") else single, 4 + 16 / block, single, double)


def _grouped(name: str, given: Mapping[str, Any], config: ModelConfig) -> FormatBits:
    """A scale of sixteen bits a group, and a zero."""
    bits = int(given.get("bits", given.get("w_bit", 4)))
    size = int(given.get("group_size", given.get("q_group_size", 128)))
    group = config.hidden_size if size == -1 else size
    symmetric = bool(given.get("sym", True)) and name != "awq"
    kept = 8 if bits == 8 else 4
    return FormatBits(name, bits + (16 + bits) / group, kept + (16 if symmetric else 32) / group)
