"""Attention over paged keys and values, for decode rows and prefill chunks of one batch.

    out[t, h] = sum_j softmax_j(score(scale * q[t, h] . keys[j, h / group])) values[j, h / group]

over the positions j that token t sees: j <= its own position p, and j > p - window where the layer has one. score(s) is
s; with a soft cap, softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118); with ALiBi (Press et al. 2022), + slopes[h]
* (j - p), which differs from slopes[h] * j by what the softmax cancels, and is more exact far from the start.
H query heads share KV key-value heads in groups (Ainslie et al. 2023). Sums and softmax in float32.

On CUDA `kernels.gpu.attention` computes it, elsewhere `kernels.attention_cpu`. A row's result depends on its own
context alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from adaplex_server.kernels import attention_cpu


@dataclass(frozen=True)
class AttentionRows:
    """The rows of a step, shared by its layers. As in `model.batch.StepBatch`; plans: window -> what the CPU path
    computes once a step.
    """

    token_start: torch.Tensor
    context_lens: torch.Tensor
    page_table: torch.Tensor
    row_tokens: tuple[int, ...]
    row_contexts: tuple[int, ...]
    plans: Mapping[int | None, tuple[attention_cpu.Piece, ...]] = field(default_factory=dict)


def attention_rows(
    token_start: torch.Tensor,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    row_tokens: tuple[int, ...],
    row_contexts: tuple[int, ...],
    page_size: int,
    kv_heads: int,
    heads: int,
    windows: Iterable[int | None],
) -> AttentionRows:
    """Once a step. windows: those of the layers."""
    shared = (token_start, context_lens, page_table, row_tokens, row_contexts)
    if page_table.is_cuda:
        return AttentionRows(*shared)
    shape = (page_size, kv_heads, heads)
    plans = {w: attention_cpu.plan(page_table, row_tokens, row_contexts, *shape, w) for w in set(windows)}
    return AttentionRows(*shared, plans)


def attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: AttentionRows,
    scale: float,
    window: int | None,
    *,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """q: [T, H, D], last dimension contiguous; keys, values: one layer's [pages, page_size, KV, D]; slopes: [H]
    float32. Returns [T, H * D] in q's dtype.
    """
    if q.is_cuda:
        from adaplex_server.kernels.gpu import attention as gpu

        shared = (rows.token_start, rows.context_lens, rows.page_table, rows.row_tokens, rows.row_contexts)
        return gpu.attention(q, keys, values, *shared, scale, window, softcap, slopes)
    return attention_cpu.attend(q, keys, values, rows.plans[window], scale, softcap, slopes)


def reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: AttentionRows,
    scale: float,
    window: int | None,
    *,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same, row by row, as the formula says it; on any device."""
    tokens, heads, dim = q.shape
    group = heads // keys.shape[2]
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    end = 0
    for row, (count, context) in enumerate(zip(rows.row_tokens, rows.row_contexts, strict=True)):
        begin, end = end, end + count
        own = rows.page_table[row].long()
        k = keys[own].flatten(0, 1)[:context].float().repeat_interleave(group, 1)
        v = values[own].flatten(0, 1)[:context].float().repeat_interleave(group, 1)
        own_position = torch.arange(context - count, context, device=q.device)[:, None]
        position = torch.arange(context, device=q.device)
        seen = position <= own_position
        if window is not None:
            seen &= position > own_position - window
        scores = torch.einsum("thd,jhd->htj", q[begin:end].float(), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores += slopes[:, None, None] * (position - own_position)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("htj,jhd->thd", weights, v).to(q.dtype)
    return out.flatten(1)
