"""From the modules of a checkpoint to one linear of the decoder: what each format keeps of a module, and how modules
that share an input are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adaplex_server.kernels import gptq, int8, llm_int8, nf4
from adaplex_server.model.checkpoint import Checkpoint
from adaplex_server.model.formats.dense import DenseLinear
from adaplex_server.model.formats.gptq import gptq_linear
from adaplex_server.model.formats.grouped_checkpoint import AwqFormat, GptqFormat, is_grouped, read_awq, read_gptq
from adaplex_server.model.formats.int8 import Int8Linear, LlmInt8Linear, is_llm_int8, read_llm_int8
from adaplex_server.model.formats.nf4 import is_nf4, nf4_linear, read_nf4
from adaplex_server.model.formats.quantization import Quantization
from adaplex_server.model.formats.split import SplitLinear
from adaplex_server.model.linear import Linear


@dataclass(frozen=True)
class Module:
    """A linear as the checkpoint has it: its parameters are PATH.weight [out_features, in_features], transposed where
    the family stores dense weights so, and PATH.bias.
    """

    path: str
    out_features: int
    in_features: int
    transposed: bool = False


@dataclass(frozen=True)
class Place:
    """Where a base is going to live. dtype: of the activations, and of weights that are kept dense."""

    dtype: torch.dtype
    device: torch.device


Weight = torch.Tensor | nf4.Nf4Weight | gptq.GptqWeight | int8.Int8Weight | llm_int8.LlmInt8Weight
ReadWeight = Callable[[Checkpoint, Module, Place], Weight]


def read_dense(checkpoint: Checkpoint, module: Module, place: Place) -> torch.Tensor:
    """The weight in the place's dtype, in memory of its own (a checkpoint's tensors are mapped files)."""
    return _stored(checkpoint, module).to(place.device, place.dtype, copy=True).contiguous()


def _stored(checkpoint: Checkpoint, module: Module) -> torch.Tensor:
    """The weight [out_features, in_features] in the dtype of the file."""
    name = f"{module.path}.weight"
    if module.transposed:
        return checkpoint.read(name, (module.in_features, module.out_features)).t()
    return checkpoint.read(name, (module.out_features, module.in_features))


def quantizing(wanted: Quantization) -> ReadWeight:
    """Quantize a dense checkpoint in flight, from the values that the file has."""

    def read(checkpoint: Checkpoint, module: Module, place: Place) -> Weight:
        found = _stored(checkpoint, module).to(place.device)
        match wanted.kind:
            case "nf4" | "fp4":
                return nf4.quantize(found, double_quant=wanted.double_quant, kind=wanted.kind, block=wanted.block)
            case "int8":
                return llm_int8.quantize(found, wanted.int8_threshold)
            case "int8-absmax":
                return int8.quantize_absmax(found)
            case "int8-zeropoint":
                return int8.quantize_zeropoint(found)
            case "none":
                return read_dense(checkpoint, module, place)

    return read


def read_bitsandbytes(checkpoint: Checkpoint, module: Module, place: Place) -> Weight:
    """NF4 or FP4 as saved, or dense where the module was left out of quantization."""
    if is_nf4(checkpoint, module.path):
        return read_nf4(checkpoint, module.path, module.out_features, module.in_features, place.device)
    return read_dense(checkpoint, module, place)


def reading_gptq(form: GptqFormat) -> ReadWeight:
    """GPTQ as saved, or dense where the module was left out of quantization."""

    def read(checkpoint: Checkpoint, module: Module, place: Place) -> Weight:
        if is_grouped(checkpoint, module.path):
            return read_gptq(checkpoint, module.path, module.out_features, module.in_features, form, place.device)
        return read_dense(checkpoint, module, place)

    return read


def reading_awq(form: AwqFormat) -> ReadWeight:
    """AWQ as saved, or dense where the module was left out of quantization."""

    def read(checkpoint: Checkpoint, module: Module, place: Place) -> Weight:
        if is_grouped(checkpoint, module.path):
            return read_awq(checkpoint, module.path, module.out_features, module.in_features, form, place.device)
        return read_dense(checkpoint, module, place)

    return read


def reading_llm_int8(threshold: float) -> ReadWeight:
    """LLM.int8 as saved, or dense where the module was left out of quantization."""

    def read(checkpoint: Checkpoint, module: Module, place: Place) -> Weight:
        if is_llm_int8(checkpoint, module.path):
            return read_llm_int8(
                checkpoint, module.path, module.out_features, module.in_features, threshold, place.device
            )
        return read_dense(checkpoint, module, place)

    return read


def join(weights: Sequence[Weight], biases: Sequence[torch.Tensor | None], place: Place) -> Linear:
    """One linear of several that share their input, stored as one where the format allows it without changing a
    value.
    """
    joined = weights[0] if len(weights) == 1 else _fused(weights)
    if joined is None:
        return SplitLinear(tuple(join([w], [b], place) for w, b in zip(weights, biases, strict=True)))
    bias = _join_biases(weights, biases)
    match joined:
        case nf4.Nf4Weight():
            return nf4_linear(joined, bias, place.dtype)
        case gptq.GptqWeight():
            return gptq_linear(joined, bias, place.dtype)
        case int8.Int8Weight():
            return Int8Linear(joined, bias)
        case llm_int8.LlmInt8Weight():
            return LlmInt8Linear(joined, bias)
        case _:
            return DenseLinear(joined, bias)


def _fused(weights: Sequence[Weight]) -> Weight | None:
    """The weights stacked, or None where they cannot be."""
    first = weights[0]
    if isinstance(first, nf4.Nf4Weight):
        same = [w for w in weights if isinstance(w, nf4.Nf4Weight) and w.row_aligned]
        stackable = len(same) == len(weights) and len({nf4.fusable(w) for w in same}) == 1
        return nf4.fuse(same) if stackable else None
    if isinstance(first, gptq.GptqWeight):
        grouped = [w for w in weights if isinstance(w, gptq.GptqWeight)]
        return gptq.fuse(grouped) if len(grouped) == len(weights) else None
    if isinstance(first, int8.Int8Weight):
        eight = [w for w in weights if isinstance(w, int8.Int8Weight)]
        return int8.fuse(eight) if len(eight) == len(weights) else None
    if isinstance(first, llm_int8.LlmInt8Weight):
        mixed = [w for w in weights if isinstance(w, llm_int8.LlmInt8Weight)]
        return llm_int8.fuse(mixed) if len(mixed) == len(weights) else None
    dense = [w for w in weights if isinstance(w, torch.Tensor)]
    return torch.cat(dense) if len(dense) == len(weights) else None


def _out_features(weight: Weight) -> int:
    return weight.shape[0] if isinstance(weight, torch.Tensor) else weight.out_features


def _join_biases(weights: Sequence[Weight], biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    some = next((bias for bias in biases if bias is not None), None)
    if some is None or len(biases) == 1:
        return some
    return torch.cat(
        [
            some.new_zeros(_out_features(weight)) if bias is None else bias
            for weight, bias in zip(weights, biases, strict=True)
        ]
    )
