"""Paged attention against a reference, with everything that a row may not read set to NaN."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch

from adaplex_server.kernels.gpu.attention import attention

Check = Callable[..., None]
PAGE = 16
_SMALL = os.environ.get("TRITON_INTERPRET") == "1"
# Per row: this step's tokens, and the context with them. Decode rows with one and several chunks, whole prompts, later
# chunks of a prompt.
TOKENS = (1, 5, 1, 40, 2) if _SMALL else (1, 5, 1, 40, 2, 700, 1)
CONTEXTS = (300, 5, 1, 70, 90) if _SMALL else (300, 5, 1, 70, 900, 1000, 2050)
HEADS = (
    ((4, 2, 16), (3, 1, 24)) if _SMALL else ((32, 8, 128), (9, 3, 64), (14, 2, 64), (8, 8, 80), (6, 1, 96), (8, 4, 256))
)


@dataclass(frozen=True)
class Case:
    """Rows over pages, `q` a view of a fused tensor as in the decoder."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    window: int | None
    softcap: float | None = None
    slopes: torch.Tensor | None = None

    def run(self, rows: Sequence[int]) -> torch.Tensor:
        """Attention over these rows alone."""
        tokens, contexts = [TOKENS[row] for row in rows], [CONTEXTS[row] for row in rows]
        device = self.q.device
        return attention(
            torch.cat([self.of(row) for row in rows]),
            self.keys,
            self.values,
            torch.tensor([0, *accumulate(tokens)], dtype=torch.int32, device=device),
            torch.tensor(contexts, dtype=torch.int32, device=device),
            self.table[list(rows)].contiguous(),
            tuple(tokens),
            tuple(contexts),
            self.q.shape[2] ** -0.5,
            self.window,
            self.softcap,
            self.slopes,
        )

    def of(self, row: int) -> torch.Tensor:
        return self.q[sum(TOKENS[:row]) : sum(TOKENS[: row + 1])]

    def expected(self) -> torch.Tensor:
        """By torch, in float64 (no NaN is read by indexing)."""
        shared = self.q.shape[1] // self.keys.shape[2]
        out = []
        for row, context in enumerate(CONTEXTS):
            k, v = (
                pages[self.table[row].long()].flatten(0, 1)[:context].double().repeat_interleave(shared, 1)
                for pages in (self.keys, self.values)
            )
            position = torch.arange(context - TOKENS[row], context, device=k.device)[:, None]
            distance = position - torch.arange(context, device=k.device)
            seen = (distance >= 0) & (distance < (self.window or context))
            scores = torch.einsum("thd,nhd->htn", self.of(row).double(), k) * self.q.shape[2] ** -0.5
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            if self.slopes is not None:
                scores -= self.slopes[:, None, None] * distance
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            out.append(torch.einsum("htn,nhd->thd", weights, v).flatten(1))
        return torch.cat(out)


def case(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device, window: int | None) -> Case:
    rows, pages = len(TOKENS), -(-max(CONTEXTS) // PAGE) + 1
    table = (torch.randperm(rows * pages, device=device) + 1).view(rows, pages).to(torch.int32)
    keys, values = torch.full((2, rows * pages + 1, PAGE, kv_heads, dim), float("nan"), dtype=dtype, device=device)
    for row, context in enumerate(CONTEXTS):
        at = torch.arange(context, device=device)
        page = table[row, at // PAGE].long()
        keys[page, at % PAGE] = torch.randn(context, kv_heads, dim, dtype=dtype, device=device)
        values[page, at % PAGE] = torch.randn(context, kv_heads, dim, dtype=dtype, device=device)
    fused = torch.randn(sum(TOKENS), heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    return Case(fused[:, :heads], keys, values, table, window)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize(("window", "softcap", "alibi"), [(None, None, False), (20, None, False), (None, 1.5, True)])
def test_rows_of_every_kind(
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    softcap: float | None,
    alibi: bool,
    dtype: torch.dtype,
    device: torch.device,
    check: Check,
) -> None:
    made = case(heads, kv_heads, dim, dtype, device, window)
    made = replace(made, softcap=softcap, slopes=torch.rand(heads, device=device) if alibi else None)
    together = made.run(range(len(TOKENS)))
    check(together, made.expected())
    for row in (0, 3, 4):
        begin = sum(TOKENS[:row])
        assert torch.equal(made.run([row]), together[begin : begin + TOKENS[row]]), (
            "a row's bits depend on its neighbours"
        )


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("window", [None, 70])
def test_neither_chunks_nor_decoding_change_a_bit(
    page: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    """A token of a prompt has the bits that it has when it is decoded, whatever chunks came before."""
    if _SMALL and dtype == torch.float32:
        return  # numpy's order of sums depends on the shape
    length = 300 if _SMALL else 2500
    heads, kv_heads, dim = (4, 2, 16) if _SMALL else (32, 8, 128)
    pages = -(-length // page)
    table = (torch.randperm(pages, device=device) + 1).to(torch.int32)[None]
    keys, values = torch.randn(2, pages + 1, page, kv_heads, dim, dtype=dtype, device=device)
    q = torch.randn(length, heads, dim, dtype=dtype, device=device)

    def part(begin: int, end: int) -> torch.Tensor:
        count = end - begin
        starts = torch.tensor([0, count], dtype=torch.int32, device=device)
        contexts = torch.tensor([end], dtype=torch.int32, device=device)
        return attention(
            q[begin:end], keys, values, starts, contexts, table, (count,), (end,), dim**-0.5, window
        )  # fmt: skip

    whole = part(0, length)
    for begin, end in ((0, 17), (17, 130), (130, 290), (290, length)):
        assert torch.equal(part(begin, end), whole[begin:end]), f"tokens {begin} to {end}"
    for position in (0, 1, 15, 16, 63, 64, 127, 128, 129, 255, 256, 299, 2047, 2048, 2303, 2304, 2499):
        if position < length:
            assert torch.equal(part(position, position + 1)[0], whole[position]), f"position {position}"
