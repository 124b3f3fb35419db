"""Bottlenecks of mixed tokens against the same in float64, and each token's bits against what it has alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from adaplex_server.kernels.bottleneck import ACTIVATIONS, READS, BottleneckPlan, BottleneckSpan, bottleneck
from adaplex_server.kernels.finish import Amended, Unfinished, finish_add_norm, finished
from adaplex_server.kernels.gpu.bottleneck import add_bottlenecks
from adaplex_server.kernels.gpu.norm import add_norm

PAGE, POOL_PAGES, TARGETS = 8, 12, 2
HIDDEN = 72
# Pages of weights, in an order of their own, and the page of vectors, by slot; slot 2 has none at this place.
SLOTS = (((3, 1, 5), 2), ((4,), 6), ((7, 8), 9), ((10, 11), 0))


def weights(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    down = torch.randn(POOL_PAGES * PAGE, TARGETS, HIDDEN) * HIDDEN**-0.5
    up = torch.randn(POOL_PAGES * PAGE, HIDDEN) * 0.3
    for slot, (_, vectors) in enumerate(SLOTS):
        codes = ((2 * slot + 1) % len(ACTIVATIONS), 0 if slot == 2 else 1 + slot % (len(READS) - 1))
        down[vectors * PAGE + 2, 0, :2] = torch.tensor(codes)
    return down.to(dtype).to(device), up.to(dtype).to(device)


def plan_of(slots: list[int], device: torch.device, most: int = 4) -> BottleneckPlan:
    table = torch.zeros(len(SLOTS), 6, dtype=torch.int32)
    for slot, (pages, vectors) in enumerate(SLOTS):
        table[slot, : 2 + len(pages)] = torch.tensor([vectors, len(pages), *pages])
    index = torch.tensor(slots, dtype=torch.int32, device=device)
    return BottleneckPlan(index, table.to(device), most, PAGE, ())


def test_mixed_tokens(dtype: torch.dtype, device: torch.device, check: Callable[..., None]) -> None:
    slots = [0, -1, 1, 2, 0, 3, -1, 1]
    down, up = weights(dtype, device)
    stream, block = (torch.randn(len(slots), HIDDEN, dtype=dtype, device=device) for _ in range(2))
    plan = plan_of(slots, device)
    found = block.clone()
    add_bottlenecks(stream, found, down, up, plan)
    for token, slot in enumerate(slots):
        one = slice(token, token + 1)
        if slot < 0 or slot == 2:
            assert torch.equal(found[one], block[one])
            continue
        span = BottleneckSpan(token, token + 1, *SLOTS[slot])
        added = bottleneck(*(part.cpu() for part in (stream[one], block[one], down, up)), span, PAGE)
        check(found[one].cpu(), block[one].cpu().double() + added.double(), 2)
        alone = block[one].clone()
        add_bottlenecks(stream[one], alone, down, up, replace(plan, slots=plan.slots[one], most_pages=3))
        assert torch.equal(alone, found[one])


def test_not_a_number_stays_with_its_token(device: torch.device) -> None:
    down, up = weights(torch.float32, device)
    down[4 * PAGE :] = torch.nan
    stream, block = torch.randn(2, 2, HIDDEN, device=device).unbind()
    found = block.clone()
    add_bottlenecks(stream, found, down, up, plan_of([-1, -1], device))
    assert torch.equal(found, block)


@pytest.mark.parametrize("code", range(len(ACTIVATIONS)))
def test_activations(code: int, device: torch.device, check: Callable[..., None]) -> None:
    down, up = weights(torch.float32, device)
    down[6 * PAGE + 2, 0, :2] = torch.tensor([code, 1])
    stream, block = torch.randn(2, 1, HIDDEN, device=device).unbind()
    found = block.clone()
    add_bottlenecks(stream, found, down, up, plan_of([1], device))
    added = bottleneck(stream.cpu(), block.cpu(), down.cpu(), up.cpu(), BottleneckSpan(0, 1, *SLOTS[1]), PAGE)
    check(found.cpu(), block.cpu().double() + added.double(), 2)


def test_the_others_are_finished_as_ever(dtype: torch.dtype, device: torch.device) -> None:
    down, up = weights(dtype, device)
    x, weight = torch.randn(4, HIDDEN, dtype=dtype, device=device), torch.rand(HIDDEN, dtype=dtype, device=device)
    rest = Unfinished(torch.randn(2, 4, HIDDEN, device=device), dtype)
    plan, own = plan_of([-1, 0, -1, 1], device), finished(rest)
    add_bottlenecks(x, own, down, up, plan)
    amended = Amended(rest, own, plan.slots)
    assert finished(amended) is own and torch.equal(own[0::2], finished(rest)[0::2])
    found = finish_add_norm(x, amended, weight, None, 1e-5, False)
    as_ever, alone = finish_add_norm(x, rest, weight, None, 1e-5, False), add_norm(x, own, weight, None, 1e-5, False)
    for part, others, theirs in zip(found, as_ever, alone, strict=True):
        assert torch.equal(part[0::2], others[0::2]) and torch.equal(part[1::2], theirs[1::2])
