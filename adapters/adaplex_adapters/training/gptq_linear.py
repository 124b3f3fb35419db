"""A linear in AutoGPTQ's four bits that gradients pass through: expanded for each product, never kept dense.

Layout (AutoGPTQ; "gptq" keeps zeros minus one, "gptq_v2" as they are), for a weight [out, in] in G groups:
qweight int32 [in / 8, out], eight in-features a word, the first in the lowest bits; qzeros int32 [G, out / 8]; scales
float16 [G, out]; g_idx int32 [in], the group of each in-feature. w[o, i] = scales[g_idx[i], o] * (q[i, o] - z[g, o]).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adaplex_adapters.errors import StartupError
from adaplex_adapters.training.expanded_linear import ExpandedLinear

_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


@dataclass(frozen=True)
class GptqTensors:
    """One module's tensors as the checkpoint has them, but qzeros always the zeros themselves."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor


class GptqLinear(ExpandedLinear):
    """Expanded from the tensors of a checkpoint, which it keeps as they are."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor

    def __init__(self, tensors: GptqTensors, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(tensors.g_idx.numel(), tensors.scales.shape[1], bias, dtype)
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            self.register_buffer(name, getattr(tensors, name))

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in]; the product of scale and code is rounded once."""
        tensors = GptqTensors(self.qweight, self.qzeros, self.scales, self.g_idx)
        return dequantize_gptq(tensors, dtype)


def dequantize_gptq(tensors: GptqTensors, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] of one module."""
    shifts = _SHIFTS.to(tensors.qweight.device)
    codes = ((tensors.qweight[:, None, :] >> shifts[None, :, None]) & 15).flatten(0, 1)
    zeros = ((tensors.qzeros[:, :, None] >> shifts) & 15).flatten(1)
    groups = tensors.g_idx.long()
    values = (codes - zeros[groups]).float() * tensors.scales.float()[groups]
    return values.to(dtype).t().contiguous()


def gptq_tensors(state: Mapping[str, torch.Tensor], path: str, config: Mapping[str, Any]) -> GptqTensors:
    """One module's tensors of a checkpoint. Raises StartupError for what is not AutoGPTQ's four bits."""
    layout = config.get("checkpoint_format", "gptq")
    if config.get("bits") != 4 or layout not in ("gptq", "gptq_v2"):
        raise StartupError(
            f"training on GPTQ needs 4 bits in the format gptq or gptq_v2, not {config.get('bits')} bits in {layout!r}"
        )
    qweight, qzeros, scales = (state[f"{path}.{name}"] for name in ("qweight", "qzeros", "scales"))
    features = qweight.shape[0] * 8
    group = config.get("group_size", 128)
    by_position = torch.arange(features, dtype=torch.int32) // (features if group == -1 else group)
    g_idx = state.get(f"{path}.g_idx", by_position.to(qweight.device))
    if qweight.dtype != torch.int32 or qzeros.dtype != torch.int32 or g_idx.numel() != features:
        raise StartupError(f"{path}: qweight, qzeros and g_idx are not as AutoGPTQ writes them")
    return GptqTensors(qweight, _true_zeros(qzeros) if layout == "gptq" else qzeros, scales, g_idx)


def _true_zeros(stored: torch.Tensor) -> torch.Tensor:
    """AutoGPTQ takes one from whole words, with borrows between the codes: adding to whole words undoes all of them."""
    whole = (stored.to(torch.int64) + 0x11111111) & 0xFFFFFFFF
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)
