"""Linears in NF4 or FP4: which implementation multiplies, and how bitsandbytes lays them down in a checkpoint.

Source of the serialized form: bitsandbytes' `QuantState.as_dict(packed=True)`, as transformers saves it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from adaplex_adapters.errors import StartupError
from adaplex_server.kernels import nf4, nf4_cpu
from adaplex_server.kernels.blockwise8 import GROUP
from adaplex_server.model.checkpoint import Checkpoint
from adaplex_server.model.formats.packed4 import dequantize_exact
from adaplex_server.model.formats.quantization import BLOCKS
from adaplex_server.model.formats.whole import WholeLinear
from adaplex_server.model.linear import Linear

if TYPE_CHECKING:
    from adaplex_server.kernels.gpu.linear4 import Packed4

STATES: Mapping[str, nf4.Kind] = {"quant_state.bitsandbytes__nf4": "nf4", "quant_state.bitsandbytes__fp4": "fp4"}


@dataclass(frozen=True)
class Nf4Linear(WholeLinear[nf4.Nf4Weight]):
    """Multiplies with `kernels.nf4.linear`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nf4.linear(x, self.weight, self.bias)

    def dequantized(self) -> torch.Tensor:
        return nf4.dequantize(self.weight)


@dataclass(frozen=True)
class PackedNf4Linear:
    """Multiplies bfloat16 with bitsandbytes' CPU library. absmax: the exact one, which `dequantized` needs. bias:
    [out_features] or None.
    """

    packed: nf4_cpu.PackedNf4
    absmax: torch.Tensor | nf4.NestedAbsmax
    multiply: nf4_cpu.Multiply
    bias: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.packed.absmax.shape[0] * self.packed.block

    @property
    def out_features(self) -> int:
        return self.packed.absmax.shape[1]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = nf4_cpu.matmul(x, self.packed, self.multiply)
        return out if self.bias is None else out.add_(self.bias)

    def dequantized(self) -> torch.Tensor:
        return nf4.dequantize(nf4_cpu.unpack(self.packed, self.absmax))

    def nbytes(self) -> int:
        exact = self.absmax.nbytes() if isinstance(self.absmax, nf4.NestedAbsmax) else self.absmax.nbytes
        bias = self.bias.nbytes if self.bias is not None else 0
        return self.packed.codes.nbytes + self.packed.absmax.nbytes + exact + bias


@dataclass(frozen=True)
class GpuNf4Linear:
    """Multiplies with our own GPU kernel. absmax: the exact one on the host, as only `dequantized` needs it. bias:
    [out_features] or None.
    """

    packed: Packed4
    absmax: torch.Tensor | nf4.NestedAbsmax
    bias: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.packed.k

    @property
    def out_features(self) -> int:
        return self.packed.n

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        from adaplex_server.kernels.gpu.linear4 import linear4

        return linear4(x, self.packed, self.bias)

    def dequantized(self) -> torch.Tensor:
        absmax = self.absmax.dequantized() if isinstance(self.absmax, nf4.NestedAbsmax) else self.absmax
        return dequantize_exact(self.packed, absmax.view(self.out_features, -1), None)

    def nbytes(self) -> int:
        return self.packed.nbytes() + (self.bias.nbytes if self.bias is not None else 0)


def nf4_linear(weight: nf4.Nf4Weight, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
    """The fastest implementation for where the weight is and for activations of `dtype`."""
    if weight.codes.is_cuda and weight.row_aligned and dtype != torch.float32:
        return _on_gpu(weight, bias, dtype)
    if dtype == torch.bfloat16 and nf4_cpu.fits(weight):
        multiply = nf4_cpu.library(weight.kind, weight.block)
        if multiply is not None:
            return PackedNf4Linear(nf4_cpu.pack(weight), weight.absmax, multiply, bias)
    # Expanded for each call: so that the absmax need not be, too, it is kept in float32.
    return Nf4Linear(replace(weight, absmax=weight.plain_absmax()), bias)


def _on_gpu(weight: nf4.Nf4Weight, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
    from adaplex_server.kernels.gpu.linear4 import pack

    rows, columns = weight.out_features, weight.in_features
    absmax = weight.plain_absmax().view(rows, -1)
    codes = nf4.unpack_codes(weight.codes).view(rows, columns)
    packed = pack(codes, absmax, None, weight.kind, weight.block, dtype, weight.codes.device)
    exact = weight.absmax.cpu()  # of either kind
    return GpuNf4Linear(packed, exact, bias)


def is_nf4(checkpoint: Checkpoint, path: str) -> bool:
    """Whether the module's weight is in one of bitsandbytes' 4-bit forms."""
    return bool(checkpoint.names_below(f"{path}.weight.quant_state."))


def read_nf4(checkpoint: Checkpoint, path: str, rows: int, columns: int, device: torch.device) -> nf4.Nf4Weight:
    """One module's weight [rows, columns] as bitsandbytes saved it, with or without double quantization."""
    name = f"{path}.weight"
    stored = next((key for key in STATES if f"{name}.{key}" in checkpoint), None)
    if stored is None:
        found = checkpoint.names_below(f"{name}.quant_state.")
        raise StartupError(f"{found[0]}: only NF4 and FP4 are supported of bitsandbytes' 4-bit types")
    kind, state = STATES[stored], _state(checkpoint.read(f"{name}.{stored}"), f"{name}.{stored}")
    block = state.get("blocksize")
    if block not in BLOCKS or tuple(state.get("shape") or ()) != (rows, columns):
        raise StartupError(
            f"{name} is {kind.upper()} of shape {state.get('shape')} in blocks of {block}; "
            f"expected {[rows, columns]} in blocks of one of {BLOCKS}"
        )
    table = checkpoint.read(f"{name}.quant_map", (16,))
    if not torch.equal(table, nf4.code_values(kind, table.device)):
        raise StartupError(f"{name}.quant_map is not {kind.upper()}'s table of values")
    # quant_storage may be another type than uint8; the bytes are the same.
    codes = checkpoint.read(name).view(torch.uint8).reshape(-1)
    blocks = -(-rows * columns // block)
    absmax = checkpoint.read(f"{name}.absmax", (blocks,))
    if codes.numel() != -(-rows * columns // 2):
        raise StartupError(f"{name} holds {codes.numel()} bytes of codes, not {-(-rows * columns // 2)}")
    codes = codes.to(device, copy=True)
    if f"{name}.nested_absmax" not in checkpoint:
        return nf4.Nf4Weight(rows, columns, codes, absmax.to(device, torch.float32, copy=True), kind, block)
    if state.get("nested_blocksize") != GROUP:
        raise StartupError(f"{name}: absmax in groups of {state.get('nested_blocksize')}; only 256 is supported")
    table = checkpoint.read(f"{name}.nested_quant_map", (256,)).to(device, torch.float32, copy=True)
    scales = checkpoint.read(f"{name}.nested_absmax", (-(-blocks // GROUP),))
    scales = scales.to(device, torch.float32, copy=True)
    offset = torch.tensor(float(state["nested_offset"]), device=device)
    aligned = columns % block == 0
    nested = nf4.nested(absmax.to(device, copy=True).view(rows if aligned else 1, -1), table, scales, offset)
    plain = nested if aligned else nested.dequantized().view(-1)
    return nf4.Nf4Weight(rows, columns, codes, plain, kind, block)


def serialized(name: str, weight: nf4.Nf4Weight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a weight that was quantized alone, as bitsandbytes saves them. name: of the parameter; dtype:
    what the weight was before.
    """
    state: dict[str, Any] = {
        "quant_type": weight.kind,
        "blocksize": weight.block,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [weight.out_features, weight.in_features],
    }
    tensors = {
        name: weight.codes.view(-1, 1),
        f"{name}.quant_map": nf4.code_values(weight.kind, weight.codes.device).clone(),
    }
    absmax = weight.absmax
    if isinstance(absmax, nf4.NestedAbsmax):
        assert bool((absmax.row_offset == absmax.row_offset[0]).all())
        state |= {
            "nested_blocksize": GROUP,
            "nested_dtype": "float32",
            "nested_offset": float(absmax.row_offset[0]),
        }
        tensors[f"{name}.nested_absmax"] = absmax.scales
        tensors[f"{name}.nested_quant_map"] = absmax.table.clone()
        absmax = absmax.codes.view(-1)
    tensors[f"{name}.absmax"] = absmax
    tensors[f"{name}.quant_state.bitsandbytes__{weight.kind}"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    return tensors


def _state(packed: torch.Tensor, name: str) -> Mapping[str, Any]:
    try:
        found = json.loads(bytes(packed.tolist()))
    except (ValueError, TypeError) as error:
        raise StartupError(f"{name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise StartupError(f"{name} holds {type(found).__name__}, not an object")
    return found
