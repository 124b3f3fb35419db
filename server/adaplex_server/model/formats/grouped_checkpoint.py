"""GPTQ and AWQ checkpoints: what their configs say, what of it is supported, and the weight of one module.

GPTQ's layout is AutoGPTQ's and gptqmodel's, AWQ's that of its GEMM kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adaplex_adapters.errors import StartupError
from adaplex_server.kernels import gptq
from adaplex_server.kernels.int8 import Int8Weight
from adaplex_server.model.checkpoint import Checkpoint

_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class GptqFormat:
    """What a checkpoint's config says. group: in-features that share a scale, None for all of them. version: of how
    zeros are stored.
    """

    group: int | None
    version: int
    bits: int = 4

    @property
    def name(self) -> str:
        """What a base in it is called."""
        return "gptq" if self.bits == 4 else f"gptq-{self.bits}bit"


@dataclass(frozen=True)
class AwqFormat:
    """What a checkpoint's config says. group: in-features that share a scale, None for all of them."""

    group: int | None


def parse_gptq(given: Mapping[str, Any]) -> GptqFormat:
    """From config.json's quantization_config or quantize_config.json. Raises StartupError naming what is not
    supported.
    """
    bits, group = given.get("bits"), given.get("group_size", 128)
    layout = given.get("checkpoint_format", "gptq")
    if bits not in _BITS:
        raise StartupError(f"the GPTQ checkpoint has {bits} bits; only {_BITS} are supported")
    if layout not in ("gptq", "gptq_v2"):
        raise StartupError(f"the GPTQ checkpoint_format {layout!r} is not supported; use gptq or gptq_v2")
    if bits == 3 and layout == "gptq":
        # AutoGPTQ takes one from each zero, gptqmodel four, and nothing in the checkpoint says which.
        raise StartupError("GPTQ of 3 bits in checkpoint_format gptq does not say its zeros; save it as gptq_v2")
    if given.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise StartupError(f"the GPTQ pack_dtype {given['pack_dtype']!r} is not supported; use int32")
    if given.get("dynamic"):
        raise StartupError("GPTQ with settings that differ between modules (dynamic) is not supported")
    return GptqFormat(_group(group, "GPTQ"), 2 if layout == "gptq_v2" else 1, bits)


def parse_awq(given: Mapping[str, Any]) -> AwqFormat:
    """From config.json's quantization_config. Raises StartupError naming what is not supported."""
    bits, layout = given.get("bits", given.get("w_bit")), str(given.get("version", "gemm")).lower()
    if bits != 4:
        raise StartupError(f"the AWQ checkpoint has {bits} bits; only 4 are supported")
    if layout != "gemm":
        raise StartupError(f"the AWQ version {layout!r} is not supported; use gemm")
    if not given.get("zero_point", True):
        raise StartupError("AWQ without zero points (zero_point false) is not supported")
    return AwqFormat(_group(given.get("group_size", given.get("q_group_size", 128)), "AWQ"))


def _group(size: object, what: str) -> int | None:
    if size not in (-1, 32, 64, 128):
        raise StartupError(f"the {what} group_size {size!r} is not supported; use 32, 64, 128 or -1")
    return None if size == -1 else int(str(size))


def is_grouped(checkpoint: Checkpoint, path: str) -> bool:
    """Whether the module was quantized at all."""
    return f"{path}.qweight" in checkpoint


def read_gptq(
    checkpoint: Checkpoint, path: str, rows: int, columns: int, form: GptqFormat, device: torch.device
) -> gptq.GptqWeight | Int8Weight:
    """One module's weight [rows, columns]."""
    group, bits = form.group or columns, form.bits
    qweight = checkpoint.read(f"{path}.qweight", (columns * bits // 32, rows)).to(device)
    qzeros, scales = _zeros_and_scales(checkpoint, path, -(-columns // group), rows, bits, device)
    g_idx = checkpoint.read_if_there(f"{path}.g_idx", (columns,))
    g_idx = None if g_idx is None else g_idx.to(device)
    _check_types(path, qweight, qzeros, scales)
    try:
        if bits == 8:
            return _eight_bits(qweight, qzeros, scales, g_idx, group, form.version)
        return gptq.from_autogptq(qweight, qzeros, scales, g_idx, group, form.version, bits)
    except ValueError as error:
        raise StartupError(f"{path}: {error}") from error


def _eight_bits(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    group: int,
    version: int,
) -> Int8Weight:
    """Codes and zeros less 128, which changes no difference between them."""
    codes, zeros, order = gptq.stored_codes(qweight, qzeros, g_idx, group, version, 8)
    moved = zeros.to(torch.int16) - 128
    return Int8Weight(
        group,
        (codes.to(torch.int16) - 128).to(torch.int8),
        scales.t().contiguous(),
        moved if bool(moved.any()) else None,
        order,
    )


def read_awq(
    checkpoint: Checkpoint, path: str, rows: int, columns: int, form: AwqFormat, device: torch.device
) -> gptq.GptqWeight:
    """One module's weight [rows, columns]."""
    group = form.group or columns
    qweight = checkpoint.read(f"{path}.qweight", (columns, rows // 8)).to(device)
    qzeros, scales = _zeros_and_scales(checkpoint, path, -(-columns // group), rows, 4, device)
    _check_types(path, qweight, qzeros, scales)
    return gptq.from_awq(qweight, qzeros, scales, group)


def _zeros_and_scales(
    checkpoint: Checkpoint, path: str, groups: int, rows: int, bits: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    qzeros = checkpoint.read(f"{path}.qzeros", (groups, rows * bits // 32)).to(device)
    return qzeros, checkpoint.read(f"{path}.scales", (groups, rows)).to(device)


def _check_types(path: str, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> None:
    if qweight.dtype != torch.int32 or qzeros.dtype != torch.int32 or not scales.is_floating_point():
        raise StartupError(f"{path}: qweight and qzeros must be int32 and scales floating point")
