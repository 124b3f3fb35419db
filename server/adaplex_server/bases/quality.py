"""What a base format costs in quality: the loss of a text, token by token, on the same base in several formats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.model.base import Base, load_base
from adaplex_server.model.batch_builder import RowInput, build_batch
from adaplex_server.model.config import ModelConfig
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.formats.quantization import Quantization
from adaplex_server.model.kv_cache import KvCache

_PAGE = 16

FORMATS: Mapping[str, Quantization] = MappingProxyType(
    {
        "none": Quantization("none"),
        "int8": Quantization("int8"),
        "int8-absmax": Quantization("int8-absmax"),
        "int8-zeropoint": Quantization("int8-zeropoint"),
        "nf4": Quantization("nf4", double_quant=False),
        "nf4-double": Quantization("nf4"),
        "nf4-double-128": Quantization("nf4", block=128),
        "nf4-double-256": Quantization("nf4", block=256),
        "fp4": Quantization("fp4", double_quant=False),
        "fp4-double": Quantization("fp4"),
    }
)
"""What a dense base is measured in, by the names that users give."""


@dataclass(frozen=True)
class FormatQuality:
    """name: of the format. linear_bytes: memory of the linears on this device, base_bytes: of everything. loss: mean
    negative log-likelihood of a token, nats. tokens: how many were predicted.
    """

    name: str
    linear_bytes: int
    base_bytes: int
    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss)


def measure(
    folder: Path,
    config: ModelConfig,
    name: str,
    tokens: Sequence[int],
    context: int,
    dtype: torch.dtype,
    device: torch.device,
) -> FormatQuality:
    """name: one of FORMATS; a checkpoint that is quantized already stays as it is and is told by its own format's name.

    tokens are cut into pieces of `context`, the first token of each being given. Raises InvalidRequest for too few,
    StartupError where the base cannot be read.
    """
    if len(tokens) < 2 or context < 2:
        raise InvalidRequest(f"{len(tokens)} tokens in pieces of {context} leave nothing to predict")
    wanted = FORMATS[name]
    base = load_base(
        folder,
        config=config,
        quantize=wanted.kind,
        double_quant=wanted.double_quant,
        quant_block=wanted.block,
        int8_threshold=wanted.int8_threshold,
        dtype=dtype,
        device=device,
    )
    loss, count = _loss(base, tokens, context)
    linears = sum(linear.nbytes() for layer in base.layers for linear in layer.linears.values())
    told = name if config.quantization is None else base.format
    return FormatQuality(told, linears, base.nbytes(), loss, count)


@torch.inference_mode()
def _loss(base: Base, tokens: Sequence[int], context: int) -> tuple[float, int]:
    """The mean over all predicted tokens, and how many they are."""
    config = base.config
    pages = -(-context // _PAGE)
    kv = KvCache.allocate(
        config.num_layers, pages + 1, _PAGE, config.num_kv_heads, config.head_dim, base.dtype, base.device
    )
    decoder = Decoder(base, None, context)
    total, count = 0.0, 0
    for begin in range(0, len(tokens) - 1, context):
        piece = list(tokens[begin : begin + context])
        if len(piece) < 2:
            break
        row = RowInput(piece, 0, range(1, pages + 1), logits=len(piece))
        logits = decoder.forward(build_batch([row], _PAGE, base.device), kv)[:-1]
        target = torch.tensor(piece[1:], device=base.device)
        total += float(torch.nn.functional.cross_entropy(logits.float(), target, reduction="sum"))
        count += len(piece) - 1
    return total / count, count
