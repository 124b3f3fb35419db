"""From the modules of a checkpoint to one linear of the decoder: what each format keeps of a module, and how modules
that share an input are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adaplex_server.kernels import gptq, nf4
from adaplex_server.model.checkpoint import Checkpoint
from adaplex_server.model.formats.dense import DenseLinear
from adaplex_server.model.formats.gptq import GptqFormat, gptq_linear, is_gptq, read_gptq
from adaplex_server.model.formats.nf4 import is_nf4, nf4_linear, read_nf4
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


Weight = torch.Tensor | nf4.Nf4Weight | gptq.GptqWeight
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


def quantizing(double_quant: bool) -> ReadWeight:
    """Quantize a dense checkpoint to NF4 in flight, from the values that the file has."""

    def read(checkpoint: Checkpoint, module: Module, place: Place) -> nf4.Nf4Weight:
        return nf4.quantize(_stored(checkpoint, module).to(place.device), double_quant=double_quant)

    return read


def read_bitsandbytes(checkpoint: Checkpoint, module: Module, place: Place) -> Weight:
    """NF4 as saved, or dense where the module was left out of quantization."""
    if is_nf4(checkpoint, module.path):
        return read_nf4(checkpoint, module.path, module.out_features, module.in_features, place.device)
    return read_dense(checkpoint, module, place)


def reading_gptq(form: GptqFormat) -> ReadWeight:
    """GPTQ as saved, or dense where the module was left out of quantization."""

    def read(checkpoint: Checkpoint, module: Module, place: Place) -> Weight:
        if is_gptq(checkpoint, module.path):
            return read_gptq(checkpoint, module.path, module.out_features, module.in_features, form, place.device)
        return read_dense(checkpoint, module, place)

    return read


def join(weights: Sequence[Weight], biases: Sequence[torch.Tensor | None], place: Place) -> Linear:
    """One linear of several that share their input, stored as one where the format allows it without changing a
    value.
    """
    dense = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    if len(dense) == len(weights):
        return DenseLinear(dense[0] if len(dense) == 1 else torch.cat(dense), _join_biases(weights, biases))
    four_bit = [weight for weight in weights if isinstance(weight, nf4.Nf4Weight)]
    if len(four_bit) == len(weights) and (len(weights) == 1 or all(weight.row_aligned for weight in four_bit)):
        fused = four_bit[0] if len(four_bit) == 1 else nf4.fuse(four_bit)
        return nf4_linear(fused, _join_biases(weights, biases), place.dtype)
    grouped = [weight for weight in weights if isinstance(weight, gptq.GptqWeight)]
    joined = gptq.fuse(grouped) if len(grouped) == len(weights) else None
    if joined is not None:
        return gptq_linear(joined, _join_biases(weights, biases), place.dtype)
    return SplitLinear(tuple(join([w], [b], place) for w, b in zip(weights, biases, strict=True)))


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
