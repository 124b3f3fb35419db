"""The base as a merge reads it: each weight of the checkpoint in whatever format, dequantized when it is asked for.

Implements `adaplex_adapters.merging.source.WeightSource` with the readers that the server itself loads bases with, so
that a format which can be served can be merged. Owns nothing but the open checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from adaplex_adapters.errors import StartupError
from adaplex_server.model.checkpoint import Checkpoint
from adaplex_server.model.config import ModelConfig
from adaplex_server.model.families import FAMILIES, base_shape
from adaplex_server.model.formats.choice import choose_format
from adaplex_server.model.formats.parts import Module, Place, ReadWeight, join
from adaplex_server.model.formats.quantization import Quantization

EXACT = Place(torch.float32, torch.device("cpu"))
DERIVED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Buffers of older checkpoints that follow from the config; transformers makes them itself."""


class BaseSource:
    """One checkpoint. weights: the modules that may be quantized; passed: all other tensors, with their shapes."""

    def __init__(
        self, checkpoint: Checkpoint, modules: tuple[Module, ...], passed: tuple[str, ...], read: ReadWeight
    ) -> None:
        self._checkpoint, self._read = checkpoint, read
        self._modules = {f"{module.path}.weight": module for module in modules}
        self._passed = passed

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        found = {name: tuple(self._checkpoint.read(name).shape) for name in self._passed}
        return found | {name: (m.out_features, m.in_features) for name, m in self._modules.items()}

    def read(self, name: str) -> torch.Tensor:
        module = self._modules.get(name)
        if module is None:
            return self._checkpoint.read(name)
        return join([self._read(self._checkpoint, module, EXACT)], [None], EXACT).dequantized()


@contextmanager
def open_source(folder: Path, config: ModelConfig, quantization: Quantization) -> Iterator[BaseSource]:
    """The base in `folder`, as a server with the same settings has it. Raises StartupError where it cannot be read."""
    family = FAMILIES[config.family]
    if family.transposed:
        raise StartupError(
            f"merging into a {family.model_type} base is not supported: it stores its linears transposed"
        )
    _, read = choose_format(folder, config, quantization)
    shape = base_shape(config)
    modules = [Module(path, linear.out_features, linear.in_features) for path, linear in shape.linears.items()]
    with Checkpoint(folder, prefix=f"{family.embedding.partition('.')[0]}.") as checkpoint:
        head = family.head
        if checkpoint.names_below(f"{head}.weight.") and not config.tied_head:
            modules.append(Module(head, config.vocab_size, config.hidden_size))
        passed = _passed(checkpoint, tuple(modules), config)
        yield BaseSource(checkpoint, tuple(modules), passed, read)


def _passed(checkpoint: Checkpoint, modules: tuple[Module, ...], config: ModelConfig) -> tuple[str, ...]:
    """Every tensor that is not part of a module's weight, biases included.

    A tied head is left to transformers. A GPTQ checkpoint has a bias of zeros for linears that have none; the dense
    model would refuse it.
    """
    own = tuple(f"{module.path}." for module in modules)
    biased = _biased(config)
    kept = []
    for name in checkpoint.names_below(""):
        tied = config.tied_head and name.startswith(f"{FAMILIES[config.family].head}.")
        if tied or name.endswith(DERIVED):
            continue
        if not name.startswith(own) or (name.endswith(".bias") and name.removesuffix(".bias") in biased):
            kept.append(name)
    return tuple(kept)


def _biased(config: ModelConfig) -> frozenset[str]:
    """Paths of the modules that have a bias."""
    from adaplex_server.model.families import module_paths

    return frozenset(
        path
        for layer in range(config.num_layers)
        for linear in config.biased_linears
        for path in module_paths(config, layer, linear)
    )
