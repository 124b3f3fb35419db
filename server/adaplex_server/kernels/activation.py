"""The activation of an MLP: act(x), or gated act(gate) * up.

"silu"       x / (1 + exp(-x))
"gelu"       x * (1 + erf(x / sqrt(2))) / 2
"gelu_tanh"  x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2      (Hendrycks and Gimpel 2016)
"relu"       max(x, 0)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

_FUNCTIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def activate(x: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """x [T, F] -> act(x) [T, F]; gated: x [T, 2F], gate beside up -> act(gate) * up [T, F]. A new tensor of x's
    dtype.
    """
    if x.is_cuda:
        from adaplex_server.kernels.gpu import activation as gpu

        return gpu.activate(x, activation, gated)
    function = _FUNCTIONS[activation]
    if not gated:
        return function(x)
    width = x.shape[1] // 2
    return function(x[:, :width]).mul_(x[:, width:])
