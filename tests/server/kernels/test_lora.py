"""LoRA on the CPU against the reference: distinct, identical, skewed and empty batches, odd ranks, scattered pages."""

from __future__ import annotations

import random

import pytest
import torch

from adaplex_server.kernels.lora import LoraPages, LoraStack, add_lora, plan_lora, reference

PAGE, K, SPANS, LAYERS, POOL_PAGES = 8, 40, ((0, 24), (24, 32), (32, 48)), 2, 40
N = SPANS[-1][1]
# slot -> pages: neighbours, one of many pages, two scattered ones.
PAGES = {0: (1,), 1: (2,), 2: (3, 4), 3: tuple(range(6, 30)), 4: (33, 31), 5: (39,)}


def make(dtype: torch.dtype = torch.float32, spans: tuple[tuple[int, int], ...] = SPANS) -> tuple[LoraStack, LoraPages]:
    """Every rank row is somebody's or NaN-free rubbish, and page 0 is zero."""
    torch.manual_seed(0)
    a = torch.randn(LAYERS, POOL_PAGES * PAGE, len(spans), K).to(dtype)
    b = torch.randn(LAYERS, POOL_PAGES * PAGE, N).to(dtype)
    a[:, :PAGE] = b[:, :PAGE] = 0
    table = torch.zeros(len(PAGES), 24, dtype=torch.int32)
    for slot, pages in PAGES.items():
        table[slot, : len(pages)] = torch.tensor(pages)
    counts = torch.tensor([len(pages) for pages in PAGES.values()], dtype=torch.int32)
    return LoraStack(a, b, torch.rand(LAYERS, len(PAGES), len(spans)), spans), LoraPages(table, counts, PAGE, PAGES)


def apply(
    stack: LoraStack, pages: LoraPages, y: torch.Tensor, x: torch.Tensor, tokens: list[int], slots: list[int]
) -> torch.Tensor:
    out = y.clone()
    plan = plan_lora({"qkv": stack}, pages, tokens, slots)
    if plan is not None:
        add_lora(out, x, plan, "qkv", 1)
    return out


BATCHES = {
    "no row": ([1], [-1]),
    "one": ([1], [5]),
    "distinct": ([1] * 6, [0, 1, 2, 3, 4, 5]),
    "identical": ([1] * 9, [2] * 9),
    "skewed": ([1] * 12, [0] * 9 + [1, -1, 4]),
    "scattered over the batch": ([1] * 7, [0, -1, 1, 0, -1, 5, 0]),
    "prefill": ([40, 3, 70], [1, 0, 3]),
    "mixed": ([1, 40, 1, 1, 5], [0, 4, -1, 0, 2]),
}


@pytest.mark.parametrize(("tokens", "slots"), BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference(tokens: list[int], slots: list[int], dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    stack, pages = make(pool_dtype)
    x, y = torch.randn(sum(tokens), K).to(dtype), torch.randn(sum(tokens), N).to(dtype)
    by_token = [slot for count, slot in zip(tokens, slots, strict=True) for _ in range(count)]
    wanted = reference(y, x, stack, pages, 1, by_token)
    got = apply(stack, pages, y, x, tokens, slots)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * 10)
    base = [i for i, slot in enumerate(by_token) if slot < 0]
    assert torch.equal(got[base], y[base])


@pytest.mark.parametrize("spans", [SPANS, ((0, N),)])
def test_a_token_is_its_own(spans: tuple[tuple[int, int], ...]) -> None:
    """Bit for bit the same alone and in company, in whatever order."""
    stack, pages = make(spans=spans)
    x, y = torch.randn(8, K), torch.randn(8, N)
    rng = random.Random(0)
    slots = [0, 1, 2, 5, 0, 3, 4, -1]
    for _ in range(20):
        order = rng.sample(range(8), rng.randint(1, 8))
        chosen = [slots[i] for i in order]
        got = apply(stack, pages, y[order], x[order], [1] * len(order), chosen)
        for place, i in enumerate(order):
            alone = apply(stack, pages, y[i : i + 1], x[i : i + 1], [1], [slots[i]])
            if torch.backends.mkl.is_available():
                assert torch.equal(got[place], alone[0]), (order, i)
            else:
                torch.testing.assert_close(got[place], alone[0])


def test_a_neighbours_infinity_stays_there() -> None:
    stack, pages = make()
    x, y = torch.randn(4, K), torch.randn(4, N)
    wanted = apply(stack, pages, y, x, [1] * 4, [0, 1, -1, 2])
    x[1] = torch.nan
    stack.a[:, 3 * PAGE : 5 * PAGE] = 3e38
    got = apply(stack, pages, y, x, [1] * 4, [0, 1, -1, 2])
    assert got[1].isnan().all() and not torch.isfinite(got[3]).any()
    assert torch.equal(got[[0, 2]], wanted[[0, 2]])
