"""A linear whose weight is kept in few bits and expanded for each product: what the quantized linears share."""

from __future__ import annotations

from typing import Any

import torch


class ExpandedLinear(torch.nn.Linear):
    """y = x W^T + bias with W expanded to x's dtype in each call and again for each gradient; W has no gradient.

    It is a Linear to PEFT, which wraps it and, for DoRA, reads `weight`: the expanded values [out, in].
    """

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        frozen = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", frozen)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The values [out, in] in the dtype that they are multiplied in."""
        return self.dequantized(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in]; each value is rounded once."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] floating -> [..., out] of the same dtype (of autocast's, where it is on)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product: torch.Tensor = _Product.apply(x, self)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor, linear: ExpandedLinear) -> torch.Tensor:
        context.linear = linear
        return torch.matmul(x, linear.dequantized(x.dtype).t())

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return torch.matmul(gradient, context.linear.dequantized(gradient.dtype)), None
