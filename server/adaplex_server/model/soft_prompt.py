"""A soft prompt on the device: what stands at the first positions of every row of its adapter.

Prompt tuning (Lester et al. 2021) and P-tuning (Liu et al. 2021) give embeddings, which go through all layers like
those of real tokens; prefix tuning (Li and Liang 2021) gives the keys and values of each layer themselves. Either way
they end up in the row's pages, from where the prefix cache shares them with the other rows of the adapter, so they
cost nothing per step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.spec import Adapter
from adaplex_server.model.batch import VirtualSpan


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """Of n virtual tokens: embeddings [n, hidden_size], or keys and values [layers, n, kv_heads, head_dim] as they
    stand in the pages; the other is None.
    """

    embeddings: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def __len__(self) -> int:
        held = self.embeddings if self.embeddings is not None else self.keys
        assert held is not None, "a soft prompt of nothing"
        return held.shape[0] if self.embeddings is not None else held.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in (self.embeddings, self.keys, self.values) if part is not None)

    def on(self, device: torch.device) -> SoftPrompt:
        """A copy on the device; the host does not wait for it."""

        def copied(part: torch.Tensor | None) -> torch.Tensor | None:
            if part is None or device.type != "cuda":
                return part
            return part.pin_memory().to(device, non_blocking=True)

        return SoftPrompt(copied(self.embeddings), copied(self.keys), copied(self.values))

    def embed(self, x: torch.Tensor, span: VirtualSpan) -> None:
        """Put the span's embeddings into x [T, hidden_size]. Of a prefix nobody reads what stands there."""
        if self.embeddings is not None:
            x[span.begin : span.begin + span.count] = self.embeddings[span.first : span.first + span.count]

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, kv_slots: torch.Tensor, span: VirtualSpan
    ) -> None:
        """Put the span's keys and values into a layer's pages [pages, page_size, kv_heads, head_dim], over whatever
        was computed for these tokens. kv_slots: [T], as in the batch.
        """
        if self.keys is None or self.values is None:
            return
        at = kv_slots[span.begin : span.begin + span.count]
        rows = slice(span.first, span.first + span.count)
        keys.view(-1, *keys.shape[2:]).index_copy_(0, at, self.keys[layer, rows].to(keys.dtype))
        values.view(-1, *values.shape[2:]).index_copy_(0, at, self.values[layer, rows].to(values.dtype))


def soft_prompt_of(adapter: Adapter, dtype: torch.dtype) -> SoftPrompt | None:
    """The adapter's, if it has one, in host memory. Raises InvalidAdapter if a value is not finite in `dtype`."""
    if adapter.soft_prompt is not None:
        return SoftPrompt(embeddings=_finite(adapter.soft_prompt, dtype, "soft prompt"))
    if adapter.prefix is not None:
        keys, values = _finite(adapter.prefix, dtype, "prefix").unbind(1)
        return SoftPrompt(keys=keys.contiguous(), values=values.contiguous())
    return None


def _finite(values: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    converted = values.to(dtype)
    if not torch.isfinite(converted).all():
        raise InvalidAdapter(f"the {what} holds a value that is too large for {dtype}")
    return converted
