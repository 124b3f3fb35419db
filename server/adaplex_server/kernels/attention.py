"""Attention over paged keys and values, for decode rows and prefill chunks of one batch.

    out[t, h] = sum_j softmax_j(scale * q[t, h] . keys[j, h / group]) values[j, h / group]

over the positions j that token t sees: j <= its own position, and j > its position - window where the layer has one.
H query heads share KV key-value heads in groups (Ainslie et al. 2023). Sums and softmax in float32.

On the CPU, decode rows are grouped by the power of two that their own context fits in and computed together, padded
to it; the padding is read from page 0, which holds zeros, so that no stale number (NaN) can reach a sum. A row's
result depends on its own context alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

_LEAST_WIDTH = 128


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
    plans: Mapping[int | None, CpuPlan] = field(default_factory=dict)


@dataclass(frozen=True)
class DecodeGroup:
    """R decode rows whose visible contexts are padded to C.

    tokens: [R] int64, or None when they are all tokens of the step. entries: [KV * R * C] int64, indices into a
    layer's keys as [.., D], row by row, head by head. bias: [R, 1, C] float32, 0 or -inf.
    """

    tokens: torch.Tensor | None
    entries: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class PrefillChunk:
    """One row with more than one token. entries: [KV * C] int64; mask: [tokens, C] bool, True where seen."""

    begin: int
    end: int
    entries: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class CpuPlan:
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[PrefillChunk, ...]


def attention_rows(
    token_start: torch.Tensor,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    row_tokens: tuple[int, ...],
    row_contexts: tuple[int, ...],
    page_size: int,
    kv_heads: int,
    windows: Iterable[int | None],
) -> AttentionRows:
    """Once a step. windows: those of the layers."""
    shared = (token_start, context_lens, page_table, row_tokens, row_contexts)
    if page_table.is_cuda:
        return AttentionRows(*shared)
    plans = {w: _plan(page_table, row_tokens, row_contexts, page_size, kv_heads, w) for w in set(windows)}
    return AttentionRows(*shared, plans)


def attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: AttentionRows, scale: float, window: int | None
) -> torch.Tensor:
    """q: [T, H, D], last dimension contiguous; keys, values: one layer's [pages, page_size, KV, D]. Returns [T, H *
    D] in q's dtype.
    """
    if q.is_cuda:
        from adaplex_server.kernels.gpu import attention as gpu

        shared = (rows.token_start, rows.context_lens, rows.page_table, rows.row_tokens, rows.row_contexts)
        return gpu.attention(q, keys, values, *shared, scale, window)
    plan = rows.plans[window]
    if len(plan.groups) == 1 and plan.groups[0].tokens is None:
        return _decode(q, keys, values, plan.groups[0], scale)
    out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
    for group in plan.groups:
        assert group.tokens is not None
        out.index_copy_(0, group.tokens, _decode(q.index_select(0, group.tokens), keys, values, group, scale))
    for chunk in plan.chunks:
        out[chunk.begin : chunk.end] = _prefill(q[chunk.begin : chunk.end], keys, values, chunk, scale)
    return out


def reference(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: AttentionRows, scale: float, window: int | None
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
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("htj,jhd->thd", weights, v).to(q.dtype)
    return out.flatten(1)


def _plan(
    page_table: torch.Tensor,
    row_tokens: tuple[int, ...],
    row_contexts: tuple[int, ...],
    page_size: int,
    kv_heads: int,
    window: int | None,
) -> CpuPlan:
    groups: dict[int, list[tuple[int, int, int]]] = {}
    chunks: list[PrefillChunk] = []
    begin = 0
    for row, (count, context) in enumerate(zip(row_tokens, row_contexts, strict=True)):
        if count == 1:
            seen = context if window is None else min(window, context)
            width = max(_LEAST_WIDTH, 1 << (seen - 1).bit_length())
            groups.setdefault(width, []).append((row, begin, context - seen))
        else:
            chunks.append(_chunk(page_table[row], begin, count, context, page_size, kv_heads, window))
        begin += count
    planned = tuple(
        _group(page_table, members, row_contexts, page_size, kv_heads, width, len(members) == begin)
        for width, members in groups.items()
    )
    return CpuPlan(planned, tuple(chunks))


def _group(
    page_table: torch.Tensor,
    members: list[tuple[int, int, int]],
    row_contexts: tuple[int, ...],
    page_size: int,
    kv_heads: int,
    width: int,
    everything: bool,
) -> DecodeGroup:
    """members: (row, token, first position seen) of each."""
    rows, tokens, firsts = torch.tensor(members).unbind(1)
    contexts = torch.tensor([row_contexts[row] for row, _, _ in members]).unsqueeze(1)
    positions = firsts.unsqueeze(1) + torch.arange(width)
    live = positions < contexts
    pages = page_table.index_select(0, rows).long()
    slots = pages.gather(1, (positions // page_size).clamp_(max=pages.shape[1] - 1)) * page_size + positions % page_size
    slots = slots.masked_fill_(~live, 0)
    entries = slots.unsqueeze(1) * kv_heads + torch.arange(kv_heads).unsqueeze(1)
    bias = torch.zeros(live.shape).masked_fill_(~live, -torch.inf).unsqueeze(1)
    return DecodeGroup(None if everything else tokens, entries.flatten(), bias)


def _chunk(
    pages: torch.Tensor, begin: int, count: int, context: int, page_size: int, kv_heads: int, window: int | None
) -> PrefillChunk:
    first = 0 if window is None else max(0, context - count - window + 1)
    positions = torch.arange(first, context)
    own = torch.arange(context - count, context).unsqueeze(1)
    mask = positions <= own
    if window is not None:
        mask &= positions > own - window
    slots = pages.long()[positions // page_size] * page_size + positions % page_size
    entries = slots * kv_heads + torch.arange(kv_heads).unsqueeze(1)
    return PrefillChunk(begin, begin + count, entries.flatten(), mask)


def _decode(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: DecodeGroup, scale: float
) -> torch.Tensor:
    rows, heads, dim = q.shape
    kv_heads, width = keys.shape[2], group.bias.shape[2]
    shape = (rows * kv_heads, width, dim)
    k = keys.view(-1, dim).index_select(0, group.entries).float().view(shape)
    v = values.view(-1, dim).index_select(0, group.entries).float().view(shape)
    queries = (q.float() * scale).view(rows * kv_heads, heads // kv_heads, dim)
    scores = torch.bmm(queries, k.mT)
    scores.view(rows, heads, width).add_(group.bias)
    return torch.bmm(torch.softmax(scores, -1), v).view(rows, heads * dim).to(q.dtype)


def _prefill(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunk: PrefillChunk, scale: float
) -> torch.Tensor:
    tokens, heads, dim = q.shape
    shape = (1, keys.shape[2], -1, dim)
    k = keys.view(-1, dim).index_select(0, chunk.entries).float().view(shape)
    v = values.view(-1, dim).index_select(0, chunk.entries).float().view(shape)
    queries = q.transpose(0, 1).float().unsqueeze(0)
    out = F.scaled_dot_product_attention(
        queries, k, v, attn_mask=chunk.mask, scale=scale, enable_gqa=heads != keys.shape[2]
    )
    return out[0].transpose(0, 1).reshape(tokens, heads * dim).to(q.dtype)
