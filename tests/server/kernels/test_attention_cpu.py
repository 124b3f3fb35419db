"""A token's attention is bit for bit the same however its prompt was cut, and whoever shares the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaplex_server.kernels.attention import attention, attention_rows

PAGE, DIM = 16, 32


def outputs(
    cuts: list[tuple[int, int]], kv_heads: int, heads: int, window: int | None, neighbours: int, **score: Any
) -> torch.Tensor:
    """One row's outputs, computed in these chunks (begin, end), each beside `neighbours` decoding rows."""
    generator = torch.Generator().manual_seed(7)
    length = cuts[-1][1]
    pages = -(-length // PAGE)
    keys = torch.randn(pages + 2, PAGE, kv_heads, DIM, generator=generator)
    values = torch.randn(pages + 2, PAGE, kv_heads, DIM, generator=generator)
    keys[0] = values[0] = 0
    q = torch.randn(length, heads, DIM, generator=generator)
    table = torch.zeros(1 + neighbours, pages, dtype=torch.int32)
    table[0] = torch.arange(1, pages + 1)
    table[1:, 0] = pages + 1
    found = []
    for begin, end in cuts:
        tokens, contexts = (end - begin, *[1] * neighbours), (end, *[5] * neighbours)
        rows = attention_rows(
            torch.tensor([0, *tokens]).cumsum(0), torch.tensor(contexts), table, tokens, contexts,
            PAGE, kv_heads, heads, [window],
        )  # fmt: skip
        step = torch.cat((q[begin:end], torch.randn(neighbours, heads, DIM)))
        found.append(attention(step, keys, values, rows, 0.2, window, **score)[: end - begin])
    return torch.cat(found)


@pytest.mark.parametrize(
    ("kv_heads", "heads", "window", "threads"),
    [(*heads, window, 1) for heads in ((3, 9), (2, 2), (1, 8)) for window in (None, 20, 150)] + [(3, 9, None, 2)],
)
def test_chunks_and_neighbours_change_no_bit(kv_heads: int, heads: int, window: int | None, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        length = 300
        whole = outputs([(0, length)], kv_heads, heads, window, 0)
        one_by_one = outputs([(i, i + 1) for i in range(length)], kv_heads, heads, window, 3)
        odd = [(0, 1), (1, 130), (130, 131), (131, 257), (257, 300)]
        in_chunks = outputs(odd, kv_heads, heads, window, 1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, one_by_one)
    assert torch.equal(whole, in_chunks)


def test_a_long_chunk_is_cut_without_changing_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = outputs([(0, 300)], 1, 4, None, 0)
    monkeypatch.setattr("adaplex_server.kernels.attention_cpu._MOST_SCORES", 4 * 256 * 16)
    assert torch.equal(whole, outputs([(0, 300)], 1, 4, None, 0))


def test_neither_with_a_soft_cap_and_alibi() -> None:
    score = {"softcap": 4.0, "slopes": torch.rand(9, generator=torch.Generator().manual_seed(1))}
    whole = outputs([(0, 150)], 3, 9, None, 0, **score)
    assert torch.equal(whole, outputs([(i, i + 1) for i in range(150)], 3, 9, None, 2, **score))
    assert torch.equal(whole, outputs([(0, 1), (1, 129), (129, 150)], 3, 9, None, 1, **score))
