"""Rows that do not depend on how many there are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaplex_server.kernels import dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(960, 576), (37, 100), (4096, 4096)])
def test_a_row_does_not_depend_on_the_others(shape: tuple[int, int], dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    weight = (torch.randn(*shape, generator=random) * 0.05).to(dtype)
    x = torch.randn(70, shape[1], generator=random).to(dtype)
    whole = dense.linear(x, weight)
    for rows in (*range(1, 13), 17, 33):
        assert torch.equal(dense.linear(x[5 : 5 + rows], weight), whole[5 : 5 + rows]), rows


def test_it_is_a_linear_with_bias_and_another_result_type() -> None:
    random = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*shape, generator=random) for shape in ((3, 40), (24, 40), (24,)))
    torch.testing.assert_close(dense.linear(x, weight, bias), F.linear(x, weight, bias))
    assert dense.linear(x.bfloat16(), weight.bfloat16(), out_dtype=torch.float32).dtype == torch.float32
    assert dense.linear(x[:0], weight, bias).shape == (0, 24)
