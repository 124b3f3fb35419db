"""A linear for few tokens on the GPU whose end is left to whoever takes its result, so that both are one launch.

    y[t, n] = (sum of the parts + scaling * h[t] . B[:, n]) * f[t, n] + bias[n] * g[t, n]

in float32, where h = A x is the token's own adapter's (absent for the base), and f and g are the token's own factors,
if any (`kernels.factors`).
`finished` gives y as a tensor; `finish_activation`, `finish_add_norm` and `finish_rotary` go on with it before it is
rounded. Sums follow an order that the linear and the token's own adapter fix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaplex_server.kernels import activation as activations
from adaplex_server.kernels import norm, rotary
from adaplex_server.kernels.lora_tiles import LoraTiles


@dataclass(frozen=True)
class Shrunk:
    """What the adapters add to a linear, half computed. h: [segments, T, rows] float32 (`kernels.gpu.shrink`); b:
    [pool rows, N] of the layer; scaling: [S, G] float32; spans: [begin, end) of each target in N; slot_pages [S, Q]
    and slot_page_count [S] int32; page_rows: rank rows of a page. tiles: with the slots of all tokens.
    """

    h: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    slot_pages: torch.Tensor
    slot_page_count: torch.Tensor
    page_rows: int
    tiles: LoraTiles


@dataclass(frozen=True)
class OutputScale:
    """A token's factors are those of pool rows index and index + 1 of vectors [pool rows, N], added; of its bias those
    of the two rows after them. index [T] int32: negative for none.
    """

    vectors: torch.Tensor
    index: torch.Tensor


@dataclass(frozen=True)
class Unfinished:
    """parts: [S, T, N], float32 or, where S is 1, of the activations' dtype; bias [N]; dtype: of the activations."""

    parts: torch.Tensor
    dtype: torch.dtype
    bias: torch.Tensor | None = None
    shrunk: Shrunk | None = None
    scale: OutputScale | None = None

    @property
    def shape(self) -> torch.Size:
        """[T, N] of the result."""
        return self.parts.shape[1:]


@dataclass(frozen=True)
class Amended:
    """A result to some tokens of which something was added. rest: as it was, to be finished for the others as ever, so
    that they keep their bits; own: [T, N], finished, with what was added; slots: [T] int32, negative for the others.
    """

    rest: Unfinished
    own: torch.Tensor
    slots: torch.Tensor


def finished(y: torch.Tensor | Unfinished | Amended) -> torch.Tensor:
    """[T, N] in the activations' dtype."""
    if isinstance(y, torch.Tensor):
        return y
    if isinstance(y, Amended):
        return y.own
    from adaplex_server.kernels.gpu import finish as gpu

    return gpu.finish(y)


def finish_activation(y: torch.Tensor | Unfinished, activation: str, gated: bool) -> torch.Tensor:
    """`kernels.activation.activate` of y."""
    if isinstance(y, torch.Tensor):
        return activations.activate(y, activation, gated)
    from adaplex_server.kernels.gpu import finish as gpu

    return gpu.finish_activation(y, activation, gated)


def finish_add_norm(
    x: torch.Tensor,
    y: torch.Tensor | Unfinished | Amended | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    center: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.norm.add_norm` of x and y."""
    if y is None or isinstance(y, torch.Tensor):
        return norm.add_norm(x, y, weight, bias, eps, center)
    if isinstance(y, Amended):
        from adaplex_server.kernels.gpu.norm import add_norm_of_some

        total, normed = finish_add_norm(x, y.rest, weight, bias, eps, center)
        add_norm_of_some(x, y.own, y.slots, weight, bias, eps, center, total, normed)
        return total, normed
    from adaplex_server.kernels.gpu import finish_norm as gpu

    return gpu.finish_add_norm(x, y, weight, bias, eps, center)


def finish_rotary(
    y: Unfinished,
    heads: int,
    rotation: rotary.Rotation,
    kv_slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor | None:
    """`kernels.rotary.rotate_and_write` of y, whose outputs are `heads` q heads, then the k heads, then the v heads.
    None where that is not one launch: a head that is turned in part, or of an odd size.
    """
    from adaplex_server.kernels.gpu import finish as gpu

    if not gpu.fits_rotary(rotation.cos.shape[1], keys.shape[3], q_weight is not None):
        return None
    return gpu.finish_rotary(
        y, heads, rotation.positions, kv_slots, rotation.cos, rotation.sin, keys, values, q_weight, k_weight, eps
    )


def reference(y: Unfinished, slots: list[int], pages: dict[int, tuple[int, ...]]) -> torch.Tensor:
    """y [T, N] in float32 as the formula says it; on any device. slots: each token's; pages: the slots' pages."""
    total = y.parts.float().sum(0)
    found = y.shrunk
    for token, slot in enumerate(slots):
        if found is None or slot < 0:
            continue
        own = [page * found.page_rows + i for page in pages[slot] for i in range(found.page_rows)]
        targets = len(found.spans)
        h = found.h[:, token, : len(own) * targets].sum(0).view(-1, targets) * found.scaling[slot]
        for target, (begin, end) in enumerate(found.spans):
            total[token, begin:end] += h[:, target] @ found.b[own, begin:end].float()
    if y.scale is not None:
        for token, index in enumerate(y.scale.index.tolist()):
            if index >= 0:
                total[token] *= y.scale.vectors[index : index + 2].float().sum(0)
    if y.bias is None:
        return total
    bias = y.bias.float().expand(total.shape).clone()
    if y.scale is not None:
        for token, index in enumerate(y.scale.index.tolist()):
            if index >= 0:
                bias[token] *= y.scale.vectors[index + 2 : index + 4].float().sum(0)
    return total + bias
