"""All LoRAs of a pass in the dtype that it multiplies in, made by a few launches; their gradients come back the same
way. The weights themselves stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from adaplex_adapters.training.fused.adapted import LowRank

Pair = tuple[torch.Tensor, torch.Tensor] | None
"""A and s B of one linear: [rank, in] and [out, rank], or stacked for several groups of rows."""


def halves(loras: Sequence[LowRank | None], dtype: torch.dtype) -> list[Pair]:
    """A pair for each LoRA, None where there is none."""
    pieces = [piece for lora in loras if lora is not None and lora.a for piece in _pieces(lora)]
    if not pieces:
        return [None] * len(loras)
    made = iter(_Halves.apply(dtype, pieces, *(weight for piece in pieces for weight in piece.weights)))
    return [(next(made), next(made)) if lora is not None and lora.a else None for lora in loras]


@dataclass(frozen=True)
class _Piece:
    """Weights of one shape that are stacked, and the factor of each."""

    weights: tuple[torch.Tensor, ...]
    factors: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack; one alone is no stack."""
        one = tuple(self.weights[0].shape)
        return one if len(self.weights) == 1 else (len(self.weights), *one)


def _pieces(lora: LowRank) -> Iterator[_Piece]:
    yield _Piece(lora.a, (1.0,) * len(lora.a))
    yield _Piece(lora.b, lora.scalings)


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, dtype: torch.dtype, pieces: Sequence[_Piece], *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        context.shapes = [weight.shape for weight in weights]
        context.factors = [factor for piece in pieces for factor in piece.factors]
        scaled = list(weights)
        _scale(scaled, context.factors, in_place=False)
        flat = torch.cat([weight.reshape(-1) for weight in scaled]).to(dtype)
        sizes = [sum(weight.numel() for weight in piece.weights) for piece in pieces]
        return tuple(part.view(piece.shape) for part, piece in zip(flat.split(sizes), pieces, strict=True))

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).float()
        parts = flat.split([shape.numel() for shape in context.shapes])
        found = [part.view(shape) for part, shape in zip(parts, context.shapes, strict=True)]
        _scale(found, context.factors, in_place=True)
        return (None, None, *found)


def _scale(tensors: list[torch.Tensor], factors: Sequence[float], in_place: bool) -> None:
    """Multiply those whose factor is not 1."""
    places = [i for i, factor in enumerate(factors) if factor != 1.0]
    if not places:
        return
    chosen, by = [tensors[i] for i in places], [factors[i] for i in places]
    if in_place:
        torch._foreach_mul_(chosen, by)
        return
    for place, scaled in zip(places, torch._foreach_mul(chosen, by), strict=True):
        tensors[place] = scaled
