"""Bases with random weights of any shape, made straight on the device in a format: for benchmarks, where only shapes
and bytes matter.

Magnitudes are such that activations stay finite: each linear keeps the scale of its input.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import torch

from adaplex_server.kernels import gptq, int8, llm_int8, nf4
from adaplex_server.kernels.blockwise8 import GROUP, dynamic_code
from adaplex_server.model.base import Base, LayerWeights, NormWeights
from adaplex_server.model.config import ModelConfig
from adaplex_server.model.families import FAMILIES, linear_targets
from adaplex_server.model.formats.parts import Place, Weight, join
from adaplex_server.model.linear import Linear

Format = Literal["nf4", "fp4", "gptq", "int8", "int8-absmax", "int8-zeropoint", "none"]

_GPTQ_GROUP = 128
# Root mean square of uniformly drawn codes: NF4's and FP4's sixteen values, code - 8 of four bits, and eight bits.
_NF4_RMS = 0.558
_FP4_RMS = 0.487
_INT4_RMS = 4.64
_INT8_RMS = 73.9


@torch.no_grad()
def random_base(
    config: ModelConfig,
    format: Format = "nf4",
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Base:
    """format: "nf4" or "fp4" (double quantization), "gptq" (symmetric, groups of 128 or all in-features), "int8"
    (LLM.int8), "int8-absmax" or "int8-zeropoint" (weight-only), or "none" (dense in `dtype`).

    The same seed gives the same base on one kind of device. A few seconds at the shape of an 8B model on a GPU.
    """
    place = Place(dtype, torch.device(device))
    random = torch.Generator(place.device).manual_seed(seed)
    layers = tuple(_layer(config, format, place, random) for _ in range(config.num_layers))
    embedding = _normal(config.vocab_size, config.hidden_size, 1.0, place, random)
    head = embedding
    if not config.tied_head:
        head = _normal(config.vocab_size, config.hidden_size, config.hidden_size**-0.5, place, random)
    name = f"{format}-double" if format in ("nf4", "fp4") else format
    family, positions = FAMILIES[config.family], None
    if family.positions is not None:
        positions = _normal(config.max_context + family.position_offset, config.hidden_size, 0.1, place, random)
    return Base(
        config, embedding, layers, _norm(config, config.hidden_size, place), head, name,
        positions=positions,
        embedding_norm=None if family.embedding_norm is None else _norm(config, config.hidden_size, place),
        head_bias=_normal(1, config.vocab_size, 0.1, place, random)[0] if family.head_bias else None,
    )  # fmt: skip


def _layer(config: ModelConfig, format: Format, place: Place, random: torch.Generator) -> LayerWeights:
    widths = {"q": config.head_dim, "k": config.head_dim}
    norms = {norm: _norm(config, widths.get(norm, config.hidden_size), place) for norm in FAMILIES[config.family].norms}
    linears: dict[str, Linear] = {}
    for name, targets in linear_targets(config).items():
        weight = _weight(targets.out_features, targets.in_features, format, place, random)
        bias = None
        if name in config.biased_linears:
            bias = torch.zeros(targets.out_features, dtype=place.dtype, device=place.device)
        linears[name] = join([weight], [bias], place)
    return LayerWeights(MappingProxyType(norms), MappingProxyType(linears))


def _norm(config: ModelConfig, width: int, place: Place) -> NormWeights:
    family = FAMILIES[config.family]
    ones = torch.ones(width, dtype=torch.float32 if family.norm_offset else place.dtype, device=place.device)
    return NormWeights(ones, torch.zeros_like(ones) if family.norm == "layer" else None)


def _normal(rows: int, columns: int, deviation: float, place: Place, random: torch.Generator) -> torch.Tensor:
    out = torch.empty(rows, columns, dtype=place.dtype, device=place.device)
    return out.normal_(0, deviation, generator=random)


def _weight(rows: int, columns: int, format: Format, place: Place, random: torch.Generator) -> Weight:
    """With a deviation of about 1 / sqrt(columns)."""
    deviation = columns**-0.5
    if format == "none":
        return _normal(rows, columns, deviation, place, random)
    if format == "gptq":
        return _gptq(rows, columns, deviation / _INT4_RMS, place.device, random)
    if format in ("nf4", "fp4"):
        kind: nf4.Kind = "nf4" if format == "nf4" else "fp4"
        scale = deviation / (_NF4_RMS if kind == "nf4" else _FP4_RMS)
        return replace(_nf4(rows, columns, scale, place.device, random), kind=kind)
    codes = _bytes(rows * columns, place.device, random).view(torch.int8).view(rows, columns)
    scales = torch.full((rows, 1), deviation / _INT8_RMS, device=place.device)
    if format == "int8":
        return llm_int8.LlmInt8Weight(codes, scales.view(-1) * 127)
    zeros = torch.full((rows, 1), 3, dtype=torch.int16, device=place.device) if format == "int8-zeropoint" else None
    return int8.Int8Weight(columns, codes, scales, zeros)


def _bytes(count: int, device: torch.device, random: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device=device, generator=random)


def _nf4(rows: int, columns: int, scale: float, device: torch.device, random: torch.Generator) -> nf4.Nf4Weight:
    """absmax: `scale`, give or take a quarter."""
    codes = _bytes(-(-rows * columns // 2), device, random)
    blocks = -(-rows * columns // nf4.BLOCK)
    aligned = columns % nf4.BLOCK == 0
    absmax = nf4.nested(
        _bytes(blocks, device, random).view(rows if aligned else 1, -1),
        dynamic_code(device),
        torch.full((-(-blocks // GROUP),), scale / 4, device=device),
        torch.tensor(scale, device=device),
    )
    return nf4.Nf4Weight(rows, columns, codes, absmax if aligned else absmax.dequantized().view(-1))


def _gptq(rows: int, columns: int, scale: float, device: torch.device, random: torch.Generator) -> gptq.GptqWeight:
    group = _GPTQ_GROUP if columns % _GPTQ_GROUP == 0 else columns
    codes = _bytes(rows * -(-columns // 2), device, random).view(rows, -1)
    groups = -(-columns // group)
    scales = torch.rand(rows, groups, device=device, generator=random).mul_(scale / 2).add_(scale * 0.75).half()
    zeros = torch.full((rows, groups), 8, dtype=torch.uint8, device=device)
    return gptq.GptqWeight(columns, group, codes, scales, zeros, None)
