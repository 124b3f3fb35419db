"""GPTQ's layout against an independent reading of the format, code by code."""

from __future__ import annotations

import pytest
import torch

from adaplex_server.kernels import gptq


def _stored(
    rows: int, columns: int, group: int, *, act_order: bool, version: int = 1, symmetric: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random tensors as AutoGPTQ stores them, and the weight [N, K] that they mean, worked out with Python's
    integers.
    """
    random = torch.Generator().manual_seed(rows + columns + group)
    groups = -(-columns // group)
    codes = torch.randint(0, 16, (rows, columns), generator=random)
    zeros = torch.full((rows, groups), 8) if symmetric else torch.randint(0, 16, (rows, groups), generator=random)
    scales = (torch.rand(groups, rows, generator=random) * 0.01 + 0.001).half()
    g_idx = torch.arange(columns) // group
    if act_order:
        g_idx = g_idx[torch.randperm(columns, generator=random)]

    def word(values: list[int]) -> int:
        found = sum(value << (4 * index) for index, value in enumerate(values))
        return found - (1 << 32) if found >= 1 << 31 else found

    def zero_word(values: list[int]) -> int:
        found = sum(value << (4 * index) for index, value in enumerate(values))
        if version == 1:
            found = (found - 0x11111111) % (1 << 32)
        return found - (1 << 32) if found >= 1 << 31 else found

    qweight = [[word(codes[n, k : k + 8].tolist()) for n in range(rows)] for k in range(0, columns, 8)]
    qzeros = [[zero_word(zeros[n : n + 8, g].tolist()) for n in range(0, rows, 8)] for g in range(groups)]
    dense = (codes - zeros[:, g_idx]) * scales.float()[g_idx].t()
    stored = {
        "qweight": torch.tensor(qweight, dtype=torch.int32),
        "qzeros": torch.tensor(qzeros, dtype=torch.int32),
        "scales": scales,
        "g_idx": g_idx.to(torch.int32),
    }
    return stored, dense


CASES = {
    "group 128": {"columns": 384, "group": 128, "act_order": False},
    "group 64": {"columns": 192, "group": 64, "act_order": False},
    "group 32, act-order": {"columns": 96, "group": 32, "act_order": True},
    "group 128, act-order": {"columns": 256, "group": 128, "act_order": True},
    "one group": {"columns": 128, "group": 128, "act_order": False},
    "one group that no kernel knows": {"columns": 72, "group": 72, "act_order": False},
    "a short last group": {"columns": 160, "group": 128, "act_order": False},
    "symmetric": {"columns": 128, "group": 64, "act_order": False, "symmetric": True},
    "version 2": {"columns": 128, "group": 64, "act_order": True, "version": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_dequantized_is_what_the_format_says(case: str) -> None:
    stored, dense = _stored(48, **CASES[case])
    weight = gptq.from_autogptq(**stored, group=CASES[case]["group"], version=CASES[case].get("version", 1))
    assert (weight.order is not None) == CASES[case]["act_order"]
    assert torch.equal(gptq.dequantize(weight), dense)


@pytest.mark.parametrize("case", [case for case in CASES if "no kernel" not in case and "short" not in case])
def test_cpu_kernel_multiplies_by_the_weight(case: str) -> None:
    stored, dense = _stored(48, **CASES[case])
    weight = gptq.from_autogptq(**stored, group=CASES[case]["group"], version=CASES[case].get("version", 1))
    packed = gptq.cpu_int4(weight)
    assert packed is not None
    x = torch.randn(40, weight.in_features, generator=torch.Generator().manual_seed(5)).bfloat16()
    ordered = x if weight.order is None else x[:, weight.order]
    found, expected = gptq.cpu_matmul(ordered, packed), x.float() @ dense.T
    assert (found.float() - expected).norm() <= 0.006 * expected.norm()
    for rows in (1, 2, 3, 8, 17):
        assert torch.equal(gptq.cpu_matmul(ordered[4 : 4 + rows], packed), found[4 : 4 + rows]), rows
    assert torch.equal(gptq.cpu_codes(packed), gptq.unpack_pairs(weight.codes, weight.in_features))


@pytest.mark.parametrize("case", ["one group that no kernel knows", "a short last group"])
def test_shapes_that_the_cpu_kernel_does_not_take_are_told(case: str) -> None:
    stored, _ = _stored(48, **CASES[case])
    assert gptq.cpu_int4(gptq.from_autogptq(**stored, group=CASES[case]["group"], version=1)) is None


def test_fused_equals_its_parts_and_needs_one_order() -> None:
    stored = [_stored(rows, 128, 64, act_order=True)[0] for rows in (48, 16, 32)]
    for other in stored[1:]:
        other["g_idx"] = stored[0]["g_idx"]
    parts = [gptq.from_autogptq(**one, group=64, version=1) for one in stored]
    fused = gptq.fuse(parts)
    assert fused is not None
    assert torch.equal(gptq.dequantize(fused), torch.cat([gptq.dequantize(part) for part in parts]))
    plain = gptq.from_autogptq(**(stored[0] | {"g_idx": None}), group=64, version=1)
    assert gptq.fuse([parts[0], plain]) is None


def test_uneven_groups_are_refused() -> None:
    stored, _ = _stored(48, 128, 64, act_order=False)
    stored["g_idx"][0] = 1
    with pytest.raises(ValueError, match="g_idx"):
        gptq.from_autogptq(**stored, group=64, version=1)
