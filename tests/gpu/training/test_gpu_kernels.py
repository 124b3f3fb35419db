"""The training kernels against their formulas in plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaplex_adapters.training.encoding import IGNORED
from adaplex_adapters.training.fused import gpu_kernels, pointwise

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    bound = 1e-5 if found.dtype == torch.float32 else 2**-7
    assert float((found.float() - wanted.float()).norm() / wanted.float().norm()) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 200])
def test_norms(width: int, dtype: torch.dtype, device: torch.device) -> None:
    x, delta, gradient, beside = (torch.randn(7, width, dtype=dtype, device=device) for _ in range(4))
    weight = torch.rand(width, dtype=dtype, device=device) + 0.5
    for added, more in ((None, None), (delta, beside)):
        total, normed, root = gpu_kernels.norm(x, added, weight, 1e-5)
        for found, wanted in zip(
            (total, normed, root),
            pointwise._norm(x.cpu(), None if added is None else added.cpu(), weight.cpu(), 1e-5),
            strict=True,
        ):
            near(found.cpu(), wanted)
        found = gpu_kernels.norm_gradient(gradient, more, total, weight, root)
        parts = [None if t is None else t.cpu() for t in (gradient, more, total, weight, root)]
        near(found.cpu(), pointwise._norm_gradient(*parts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(dtype: torch.dtype, device: torch.device) -> None:
    gate, up, gradient = (torch.randn(5, 300, dtype=dtype, device=device) for _ in range(3))
    near(gpu_kernels.gated(gate, up).cpu(), pointwise.gated(gate.cpu(), up.cpu()))
    wanted = pointwise.gated_gradient(gate.cpu(), up.cpu(), gradient.cpu())
    for found, each in zip(gpu_kernels.gated_gradient(gate, up, gradient.clone()), wanted, strict=True):
        near(found.cpu(), each)


@pytest.mark.parametrize("heads, width", [(4, 32), (3, 64), (1, 96)])
def test_rotary_positions(heads: int, width: int, device: torch.device) -> None:
    x = torch.randn(2, 9, heads, width, device=device)
    angles = torch.rand(9, width // 2, device=device).repeat(1, 2)
    for sign in (1.0, -1.0):
        found = gpu_kernels.rotated(x, angles.cos(), angles.sin(), sign)
        near(found.cpu(), pointwise._rotated(x.cpu(), angles.cos().cpu(), angles.sin().cpu(), sign))


@pytest.mark.parametrize("width", [50, 9000])
def test_surprise(width: int, device: torch.device) -> None:
    logits = (torch.randn(6, width, device=device) * 3).requires_grad_()
    targets = torch.tensor([0, width - 1, IGNORED, 7, 7, IGNORED], device=device)
    wanted = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
    wanted.sum().backward()
    ours = logits.detach().clone()
    near(gpu_kernels.surprise(ours, targets, IGNORED, False), wanted.detach())
    assert torch.equal(ours, logits.detach())
    near(gpu_kernels.surprise(ours, targets, IGNORED, True), wanted.detach())
    near(ours, logits.grad)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block", [64, 128])
def test_values_are_those_of_bitsandbytes(kind: str, double: bool, block: int, device: torch.device) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from adaplex_adapters.training.fused.four_bit_linear import FourBitLinear

    weight = torch.randn(96, 640, dtype=torch.bfloat16, device=device)
    linear = bitsandbytes.nn.Linear4bit(640, 96, bias=False, compute_dtype=torch.bfloat16, device="meta")
    settings = {"quant_type": kind, "compress_statistics": double, "blocksize": block, "module": linear}
    linear.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **settings).to(device)
    wanted = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    assert torch.equal(FourBitLinear(linear).dequantized(torch.bfloat16), wanted)
