"""The base model in memory: embedding, layers, norms and head, loaded once and never written to.

How a linear's weight is kept (dense, 4-bit, 8-bit) is its own business (`model.formats`); the decoder sees `Linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from adaplex_adapters.errors import StartupError
from adaplex_server.model.checkpoint import Checkpoint
from adaplex_server.model.config import ModelConfig
from adaplex_server.model.families import FAMILIES, linear_targets, module_paths, norm_path
from adaplex_server.model.formats.choice import choose_format
from adaplex_server.model.formats.int8 import is_llm_int8
from adaplex_server.model.formats.parts import Module, Place, ReadWeight, join, read_dense
from adaplex_server.model.formats.quantization import BLOCK, THRESHOLD, Quantization, QuantizeKind
from adaplex_server.model.linear import Linear

Progress = Callable[[str, float], None]

# Buffers that older checkpoints carry and that follow from the config; everything else must be read.
_DERIVED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class NormWeights:
    """weight, bias: [width]; bias None where the norm has none. In the dtype of the activations, but float32 where the
    weight is what the family stores plus an offset, which a shorter type would round away.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def nbytes(self) -> int:
        """Bytes of both."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


@dataclass(frozen=True)
class LayerWeights:
    """norms: "attention", "mlp", "q", "k" as the family has them. linears: "qkv", "o", "gate_up" or "up", "down"."""

    norms: Mapping[str, NormWeights]
    linears: Mapping[str, Linear]

    def nbytes(self) -> int:
        """Bytes of all of the layer."""
        return sum(norm.nbytes() for norm in self.norms.values()) + sum(
            linear.nbytes() for linear in self.linears.values()
        )


@dataclass(frozen=True)
class Base:
    """embedding, head: [vocab_size, hidden_size] in the dtype of the activations; the same tensor where the head is
    tied. positions: [positions, hidden_size], learned, the family's position_offset ahead. head_bias: [vocab_size].
    positions, embedding_norm and head_bias are None where the family has none.

    format: "none" (dense), "nf4", "nf4-double", "fp4", "fp4-double", "int8", "int8-absmax", "int8-zeropoint", "gptq",
    "gptq-8bit" (or 2 or 3) or "awq".
    """

    config: ModelConfig
    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: NormWeights
    head: torch.Tensor
    format: str
    positions: torch.Tensor | None = None
    embedding_norm: NormWeights | None = None
    head_bias: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.embedding.device

    def nbytes(self) -> int:
        """Bytes of memory that stay taken for the weights, a tied head counted once."""
        dense = [self.embedding, self.positions, self.head_bias, None if self.head is self.embedding else self.head]
        norms = [self.final_norm, self.embedding_norm]
        return (
            sum(tensor.nbytes for tensor in dense if tensor is not None)
            + sum(norm.nbytes() for norm in norms if norm is not None)
            + sum(layer.nbytes() for layer in self.layers)
        )


@torch.no_grad()
def load_base(
    folder: Path,
    *,
    config: ModelConfig,
    quantize: QuantizeKind,
    double_quant: bool,
    quant_block: int = BLOCK,
    int8_threshold: float = THRESHOLD,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> Base:
    """Read the base in `folder` to `device`, tensor by tensor: the peak is the result and one fused linear.

    quantize, double_quant, quant_block and int8_threshold say what becomes of a dense checkpoint (`Quantization`); one
    that is quantized already is kept as it is.
    dtype: of the activations, norms, biases, embedding and head. progress is told what is done and how far it is
    (0..1).

    Raises StartupError if the format is not supported, or a tensor is missing, of another shape or left over.
    """
    quantization = Quantization(quantize, double_quant, quant_block, int8_threshold)
    name, read = choose_format(folder, config, quantization)
    place = Place(dtype, device)
    tell = progress or (lambda text, fraction: None)
    family = FAMILIES[config.family]
    with Checkpoint(folder, prefix=f"{family.embedding.partition('.')[0]}.") as checkpoint:
        table = (config.vocab_size, config.hidden_size)
        embedding = read_dense(checkpoint, Module(family.embedding, *table), place)
        layers: list[LayerWeights] = []
        for layer in range(config.num_layers):
            tell(f"loading {config.name}", layer / config.num_layers)
            layers.append(_read_layer(checkpoint, config, layer, read, place))
        final_norm = _read_norm(checkpoint, family.final_norm, config.hidden_size, config, place)
        head = embedding if config.tied_head else _read_head(checkpoint, Module(family.head, *table), read, place)
        base = Base(
            config, embedding, tuple(layers), final_norm, head, name,
            positions=_read_positions(checkpoint, config, place),
            embedding_norm=_read_embedding_norm(checkpoint, config, place),
            head_bias=_read_bias(checkpoint, Module(family.head, *table), family.head_bias, place),
        )  # fmt: skip
        _refuse_leftovers(checkpoint, config)
    tell(f"loading {config.name}", 1.0)
    return base


def _read_layer(
    checkpoint: Checkpoint, config: ModelConfig, layer: int, read: ReadWeight, place: Place
) -> LayerWeights:
    family = FAMILIES[config.family]
    widths = {"q": config.head_dim, "k": config.head_dim}
    norms = {
        norm: _read_norm(
            checkpoint, norm_path(config, layer, norm), widths.get(norm, config.hidden_size), config, place
        )
        for norm in family.norms
    }
    linears: dict[str, Linear] = {}
    for linear, targets in linear_targets(config).items():
        modules = [
            Module(path, end - begin, targets.in_features, family.transposed)
            for path, (begin, end) in zip(module_paths(config, layer, linear), targets.spans, strict=True)
        ]
        biases = [_read_bias(checkpoint, module, linear in config.biased_linears, place) for module in modules]
        linears[linear] = join([read(checkpoint, module, place) for module in modules], biases, place)
    return LayerWeights(MappingProxyType(norms), MappingProxyType(linears))


def _read_norm(checkpoint: Checkpoint, path: str, width: int, config: ModelConfig, place: Place) -> NormWeights:
    family = FAMILIES[config.family]

    def read(parameter: str, dtype: torch.dtype) -> torch.Tensor:
        return checkpoint.read(f"{path}.{parameter}", (width,)).to(place.device, dtype, copy=True)

    if family.norm_offset:
        return NormWeights(read("weight", torch.float32).add_(family.norm_offset))
    return NormWeights(read("weight", place.dtype), read("bias", place.dtype) if family.norm == "layer" else None)


def _read_positions(checkpoint: Checkpoint, config: ModelConfig, place: Place) -> torch.Tensor | None:
    family = FAMILIES[config.family]
    if family.positions is None:
        return None
    return read_dense(
        checkpoint, Module(family.positions, config.max_context + family.position_offset, config.hidden_size), place
    )


def _read_embedding_norm(checkpoint: Checkpoint, config: ModelConfig, place: Place) -> NormWeights | None:
    path = FAMILIES[config.family].embedding_norm
    return None if path is None else _read_norm(checkpoint, path, config.hidden_size, config, place)


def _read_bias(checkpoint: Checkpoint, module: Module, wanted: bool, place: Place) -> torch.Tensor | None:
    """Writers of GPTQ checkpoints add zeros as the bias of linears that have none: those count as left out."""
    name = f"{module.path}.bias"
    if not wanted and name not in checkpoint:
        return None
    found = checkpoint.read(name, (module.out_features,))
    if not wanted and bool(found.any()):
        raise StartupError(f"the checkpoint has {name}, a bias that its config.json does not mention")
    return found.to(place.device, place.dtype, copy=True) if wanted else None


def _read_head(checkpoint: Checkpoint, module: Module, read: ReadWeight, place: Place) -> torch.Tensor:
    """The head is kept dense; in a checkpoint that has it quantized it is dequantized once."""
    quantized = checkpoint.names_below(f"{module.path}.weight.") or is_llm_int8(checkpoint, module.path)
    if f"{module.path}.weight" in checkpoint and not quantized:
        return read_dense(checkpoint, module, place)
    return join([read(checkpoint, module, place)], [None], place).dequantized().to(place.dtype)


def _refuse_leftovers(checkpoint: Checkpoint, config: ModelConfig) -> None:
    known = f"{FAMILIES[config.family].head}." if config.tied_head else None
    left = [
        name
        for name in checkpoint.unread()
        if not name.endswith(_DERIVED) and not (known is not None and name.startswith(known))
    ]
    if left:
        raise StartupError(
            f"the checkpoint has {len(left)} tensors that a {config.family} model has no use for, {left[0]} the first"
        )
