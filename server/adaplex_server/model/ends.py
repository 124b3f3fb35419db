"""An adapter's changes to the two ends of the decoder: the embedding and the head, by a LoRA or weights of its own.

Both are far larger than a layer's linears and rarely adapted, so they do not lie in the pool's pages but in tensors
beside it. They are computed for the adapter's own rows, after the base's results for all rows, which stay what they
are.

    embedding    x[t] = E[token] + s B A[:, token]                 before the family's scale of embeddings
    head         y = (W x + s B A x) * f + bias                    f: m / |W + s B A| with DoRA
                 y = (W (x * u) + bias) * v                        u or v with IA3
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.spec import Adapter, LoraModule
from adaplex_server.kernels import dense
from adaplex_server.model.base import Base
from adaplex_server.model.config import ModelConfig
from adaplex_server.model.families import base_shape

_ROWS = 8192
"""Of a weight as long as the vocabulary, so many are compared or measured at once."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """a: [r, hidden], or of an embedding [vocab, r]; b: [vocab, r], or of an embedding [hidden, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True, eq=False)
class Ends:
    """What an adapter has of them. embedding, head: [vocab, hidden], in place of the base's. factor: [vocab], of a
    DoRA; inputs: [hidden], outputs: [vocab], of an IA3 on the head: float32.
    """

    embedding: torch.Tensor | None = None
    embedding_lora: LowRank | None = None
    head: torch.Tensor | None = None
    head_lora: LowRank | None = None
    factor: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        """All of them."""
        for lora in (self.embedding_lora, self.head_lora):
            if lora is not None:
                yield from (lora.a, lora.b)
        for tensor in (self.embedding, self.head, self.factor, self.inputs, self.outputs):
            if tensor is not None:
                yield tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def on(self, device: torch.device) -> Ends:
        """A copy on the device; the host does not wait for it, as on a GPU these tensors are pinned."""

        def copied(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part.to(device, non_blocking=True)

        def low_rank(part: LowRank | None) -> LowRank | None:
            if part is None:
                return None
            return LowRank(part.a.to(device, non_blocking=True), part.b.to(device, non_blocking=True), part.scaling)

        return Ends(
            copied(self.embedding), low_rank(self.embedding_lora), copied(self.head), low_rank(self.head_lora),
            copied(self.factor), copied(self.inputs), copied(self.outputs),
        )  # fmt: skip

    def embed(self, x: torch.Tensor, tokens: torch.Tensor) -> None:
        """x [t, hidden], the base's embeddings of tokens [t], as the adapter has them; in place."""
        if self.embedding is not None:
            x.copy_(F.embedding(tokens, self.embedding))
        lora = self.embedding_lora
        if lora is not None:
            delta = dense.linear(F.embedding(tokens, lora.a), lora.b, out_dtype=torch.float32)
            x.copy_(delta.mul_(lora.scaling).add_(x))

    def logits(self, y: torch.Tensor, x: torch.Tensor, base: Base) -> None:
        """y [l, vocab] float32, the base's logits of x [l, hidden], as the adapter has them; in place."""
        x = x if self.inputs is None else (x.float() * self.inputs).to(x.dtype)
        if self.head is not None:
            own = dense.linear(x.to(self.head.dtype), self.head, out_dtype=torch.float32)
            y.copy_(own if base.head_bias is None else own.add_(base.head_bias))
        elif self.inputs is not None:
            y.copy_(dense.linear(x, base.head, base.head_bias, out_dtype=torch.float32))
        lora = self.head_lora
        if lora is not None:
            h = dense.linear(x.to(lora.a.dtype), lora.a)
            y.add_(dense.linear(h, lora.b, out_dtype=torch.float32), alpha=lora.scaling)
        if self.factor is not None:
            if base.head_bias is None:
                y.mul_(self.factor)
            else:
                y.sub_(base.head_bias).mul_(self.factor).add_(base.head_bias)
        if self.outputs is not None:
            y.mul_(self.outputs)


@dataclass(frozen=True)
class EndsFound:
    """The ends of an adapter, if it has some, and how many of its tensors are in them or were compared."""

    ends: Ends | None
    used: int


def ends_of(
    adapter: Adapter, base: Base | None, config: ModelConfig, dtype: torch.dtype, most_bytes: int | None = None
) -> EndsFound:
    """In host memory, in `dtype`. base: needed where a part depends on its weights. most_bytes: of memory, None for
    any. Raises InvalidAdapter if there is more, a value is not finite in `dtype`, or a copy differs from the base's.
    """
    shape = base_shape(config)
    ends, used = Ends(), 0
    _refuse_more(_size(adapter, shape.embedding, shape.head, dtype), most_bytes)
    for path, replaced in adapter.replaced.items():
        weight = _held(replaced, dtype, path, base)
        ends = replace(ends, embedding=weight) if path == shape.embedding else replace(ends, head=weight)
        used += 1
    module = adapter.modules.get(shape.embedding)
    if module is not None:
        a = _held(module.a.T.contiguous(), dtype, shape.embedding, base)
        lora = LowRank(a, _held(module.b, dtype, shape.embedding, base), module.scaling)
        ends = replace(ends, embedding_lora=lora)
        used += 2
    module = adapter.modules.get(shape.head)
    if module is not None:
        a, b = (_held(half, dtype, shape.head, base) for half in (module.a, module.b))
        ends = replace(ends, head_lora=LowRank(a, b, module.scaling))
        used += 2
        if module.magnitude is not None:
            assert base is not None, "a DoRA is laid out without its base"
            weight = adapter.replaced.get(shape.head, base.head)
            factor = module.magnitude.float() / _lengths(weight, module, base.device)
            ends = replace(ends, factor=_held(factor, torch.float32, shape.head, base))
            used += 1
    scale = adapter.scales.get(shape.head)
    if scale is not None:
        vector = _held(scale.vector, torch.float32, shape.head, base)
        ends = replace(ends, inputs=vector) if scale.on == "input" else replace(ends, outputs=vector)
        used += 1
    for path, copy in adapter.base_copies.items():
        assert base is not None, "a copy is compared without its base"
        _compare(path, copy, base.embedding if path == shape.embedding else base.head)
        used += 1
    return EndsFound(ends if next(ends.tensors(), None) is not None else None, used)


def ends_bytes(adapter: Adapter, config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that the adapter's ends take."""
    shape = base_shape(config)
    return _size(adapter, shape.embedding, shape.head, dtype)


def _size(adapter: Adapter, embedding: str, head: str, dtype: torch.dtype) -> int:
    modules = [adapter.modules[path] for path in (embedding, head) if path in adapter.modules]
    wide = [half for module in modules for half in (module.a, module.b)]
    vectors = [module.magnitude for module in modules if module.magnitude is not None]
    vectors += [adapter.scales[path].vector for path in (head,) if path in adapter.scales]
    values = sum(tensor.numel() for tensor in (*adapter.replaced.values(), *wide))
    return values * dtype.itemsize + 4 * sum(vector.numel() for vector in vectors)


def _refuse_more(size: int, most: int | None) -> None:
    if most is not None and size > most:
        raise InvalidAdapter(
            f"the adapter's own head and embedding take {size / (1 << 20):.0f} MiB of the device beside the memory for "
            f"adapters, and this server gives an adapter {most / (1 << 20):.0f} MiB (max_head_memory)"
        )


def _held(tensor: torch.Tensor, dtype: torch.dtype, path: str, base: Base | None) -> torch.Tensor:
    converted = tensor.to(dtype).contiguous()
    if not torch.isfinite(converted).all():
        raise InvalidAdapter(f"{path}: a weight is too large for {dtype}")
    # Copies from pinned memory do not hold up the steps, and pinning would.
    return converted.pin_memory() if base is not None and base.device.type == "cuda" else converted


def _lengths(weight: torch.Tensor, module: LoraModule, device: torch.device) -> torch.Tensor:
    """[vocab] float32 on the CPU: the length of each row of the head with the LoRA added."""
    a, found = module.a.to(device).float(), []
    for rows, b in zip(weight.split(_ROWS), module.b.split(_ROWS), strict=True):
        whole = torch.add(rows.to(device).float(), b.to(device).float() @ a, alpha=module.scaling)
        found.append(torch.linalg.norm(whole, dim=1).cpu())
    return torch.cat(found)


def _compare(path: str, copy: torch.Tensor, weight: torch.Tensor) -> None:
    """In the coarser of both dtypes, since either may have been converted."""
    coarser = min((copy.dtype, weight.dtype), key=lambda dtype: (-torch.finfo(dtype).eps, dtype.itemsize))
    for theirs, ours in zip(copy.split(_ROWS), weight.split(_ROWS), strict=True):
        if theirs.shape != ours.shape or not torch.equal(theirs.to(coarser), ours.to(coarser).cpu()):
            raise InvalidAdapter(
                f"wrong base: the adapter was saved with the {path} of its base, and this base has another one; it was "
                "made for another base, or for one with another vocabulary"
            )
