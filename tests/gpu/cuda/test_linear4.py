"""The CUDA kernels of 4-bit weights against exact values and against their Triton twin, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from adaplex_server.kernels import gptq, nf4
from adaplex_server.kernels.cuda import linear4 as hopper
from adaplex_server.kernels.cuda.linear4 import choose_cut
from adaplex_server.kernels.gpu import linear4 as twin
from adaplex_server.kernels.gpu.linear4 import Packed4, add_parts, dequantize4, linear4, pack, product
from adaplex_server.model.formats.packed4 import dequantize_exact

Check = Callable[..., None]
Kind = twin.Kind
ROWS = (1, 7, 8, 16, 17, 33, 64, 65, 96, 128)
# (outputs, inputs, group): parts or none; padded outputs, steps and groups; a group as long as a row.
SHAPES = ((64, 128, 64), (70, 192, 32), (4096, 512, 128), (6144, 4096, 128), (200, 14336, 512), (33, 576, 576))

hopper_only = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)
pytestmark = [pytest.mark.gpu, hopper_only]


def _random(n: int, k: int, group: int, kind: Kind, zeros: bool) -> tuple[torch.Tensor, ...]:
    groups = -(-k // group)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(n, groups, device="cuda") + 0.5) * 0.01
    lower = torch.randint(0, 16, (n, groups), device="cuda") if zeros else torch.full((n, groups), 8, device="cuda")
    return codes, scales, lower


def _both(
    n: int, k: int, group: int, kind: Kind, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[Packed4, Packed4]:
    """One weight in the CUDA kernels' layout, and in Triton's."""
    codes, scales, lower = _random(n, k, group, kind, zeros)
    given = (codes, scales, lower if zeros else None, kind, group, torch.bfloat16, torch.device("cuda"))
    ours = pack(*given)
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "usable", lambda *_: False)
        triton = pack(*given)
    assert (ours.columns == 0, triton.columns == 0) == (True, False)
    return ours, triton


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_values_are_the_twins(n: int, k: int, group: int, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    for zeros in (False, True) if kind == "int4" else (False,):
        ours, triton = _both(n, k, group, kind, zeros, monkeypatch)
        assert torch.equal(dequantize4(ours), dequantize4(triton))


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_products(n: int, k: int, group: int, monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    """Within rounding of the exact product, and each row the same bits whatever the number of rows."""
    for kind, zeros in (("nf4", False), ("int4", True)):
        ours, _ = _both(n, k, group, kind, zeros, monkeypatch)
        x = torch.randn(ROWS[-1], k, dtype=torch.bfloat16, device="cuda")
        bias = torch.randn(n, dtype=torch.bfloat16, device="cuda")
        expected = x.double() @ dequantize4(ours).double().t() + bias
        whole = linear4(x, ours, bias)
        check(whole, expected)
        for rows in ROWS:
            assert torch.equal(linear4(x[:rows], ours, bias), whole[:rows])
        parts = product(x, ours, bias)
        assert len(parts) == choose_cut(n, k).parts
        if len(parts) > 1:
            assert torch.equal(add_parts(parts, bias, torch.bfloat16), whole)


def test_bits_are_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both cut K in the same places."""
    for kind in ("nf4", "int4"):
        ours, triton = _both(28672, 512, 128, kind, kind == "int4", monkeypatch)
        x = torch.randn(50, 512, dtype=torch.bfloat16, device="cuda")
        assert torch.equal(linear4(x, ours), linear4(x, triton))


def test_more_rows_than_a_tile() -> None:
    codes, scales, _ = _random(256, 512, 64, "nf4", False)
    packed = pack(codes, scales, None, "nf4", 64, torch.bfloat16, torch.device("cuda"))
    x = torch.randn(200, 512, dtype=torch.bfloat16, device="cuda")
    parts = hopper.product(x, packed, None)
    assert torch.equal(parts[:, 128:], hopper.product(x[128:], packed, None))


def test_rows_that_lie_apart() -> None:
    codes, scales, _ = _random(128, 256, 64, "nf4", False)
    packed = pack(codes, scales, None, "nf4", 64, torch.bfloat16, torch.device("cuda"))
    wide = torch.randn(9, 520, dtype=torch.bfloat16, device="cuda")
    for x in (wide[:, :256], wide[:, 3:259], wide[::2, 8:264]):
        assert torch.equal(linear4(x, packed), linear4(x.clone(), packed))


def test_a_row_of_nan_stays_alone() -> None:
    codes, scales, _ = _random(200, 576, 64, "nf4", False)
    packed = pack(codes, scales, None, "nf4", 64, torch.bfloat16, torch.device("cuda"))
    x = torch.randn(20, 576, dtype=torch.bfloat16, device="cuda")
    clean = linear4(x, packed)
    x[4] = float("nan")
    dirty = linear4(x, packed)
    others = [row for row in range(20) if row != 4]
    assert torch.equal(dirty[others], clean[others])
    assert dirty[4].isnan().all()


def test_a_captured_chain_equals_the_launches_one_by_one() -> None:
    """Each launch may begin before the one in front has ended, whose result it reads."""
    packed = []
    for seed in range(6):
        torch.manual_seed(seed)
        codes, scales, _ = _random(4096, 4096, 64, "nf4", False)
        packed.append(pack(codes, scales, None, "nf4", 64, torch.bfloat16, torch.device("cuda")))
    x = torch.randn(16, 4096, dtype=torch.bfloat16, device="cuda")

    def chain() -> torch.Tensor:
        y = x
        for weight in packed:
            y = linear4(y, weight)
        return y

    expected = x
    for weight in packed:
        expected = linear4(expected, weight)
        torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = chain()
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, expected)


def test_exact_values(monkeypatch: pytest.MonkeyPatch) -> None:
    for n, k, group in SHAPES[:3]:
        codes, scales, lower = _random(n, k, group, "int4", True)
        packed = pack(codes, scales, lower, "int4", group, torch.bfloat16, torch.device("cuda"))
        exact = dequantize_exact(packed, scales, lower)
        assert torch.equal(exact, gptq.dequantize_codes(codes, scales, lower, group))
    codes, scales, _ = _random(70, 192, 64, "nf4", False)
    packed = pack(codes, scales, None, "nf4", 64, torch.bfloat16, torch.device("cuda"))
    table = nf4.code_values("nf4", torch.device("cuda"))
    assert torch.equal(dequantize_exact(packed, scales, None), table[codes.int()] * scales.repeat_interleave(64, dim=1))
