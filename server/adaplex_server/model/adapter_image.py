"""An adapter laid out as the device's pool has it, in host memory: what is copied when it comes to the device.

An image is whole pages of RANK_PAGE rank rows, each one contiguous, so that a page is one copy however many layers and
linears it serves. Rows beyond a module's own rank, and modules that the adapter does not target, are zero. The
factors of an adapter that has some (DoRA, IA3) are one page more (`model.factors`), and after that come those of its
bottlenecks (`model.bottlenecks`). Owns nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.spec import Adapter, LoraModule
from adaplex_server.model.base import Base
from adaplex_server.model.bottlenecks import place_bottlenecks, refuse_bottlenecks, weight_pages
from adaplex_server.model.config import ModelConfig
from adaplex_server.model.ends import Ends, ends_of
from adaplex_server.model.factors import factors_of, has_factors, place_factors
from adaplex_server.model.families import LinearTargets, base_shape, linear_targets, module_paths
from adaplex_server.model.soft_prompt import SoftPrompt, soft_prompt_of

RANK_PAGE = 8
_VERSION = 1
"""Of what a page's bytes mean; images of another version are not read."""

_EXPONENT = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}
TakePages = Callable[[int], Sequence[torch.Tensor]]
"""So many pages of `ImageLayout.page_values` values in the layout's dtype, of any content."""


@dataclass(frozen=True)
class LinearPart:
    """Where a linear's rows lie in a page, in values: a [layers, RANK_PAGE, G, K] from `a`, b [layers, RANK_PAGE, N]
    from `b` to `end`.
    """

    targets: LinearTargets
    a: int
    b: int
    end: int


@dataclass(frozen=True)
class ImageLayout:
    """How the pages of a base's adapters are laid out. parts: by linear, in the order of the forward pass."""

    config: ModelConfig
    dtype: torch.dtype
    parts: dict[str, LinearPart]

    @staticmethod
    def of(config: ModelConfig, dtype: torch.dtype) -> ImageLayout:
        """For adapters of this base, kept in `dtype`."""
        parts: dict[str, LinearPart] = {}
        at = 0
        for name, targets in linear_targets(config).items():
            b = at + config.num_layers * RANK_PAGE * len(targets.names) * targets.in_features
            end = b + config.num_layers * RANK_PAGE * targets.out_features
            parts[name] = LinearPart(targets, at, b, end)
            at = end
        return ImageLayout(config, dtype, parts)

    @property
    def page_values(self) -> int:
        """Values in a page."""
        return max(part.end for part in self.parts.values())

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.page_values * self.dtype.itemsize

    @property
    def scalings(self) -> tuple[int, int]:
        """Shape of an image's scaling: layers, and the targets of all linears in order."""
        return self.config.num_layers, sum(len(part.targets.names) for part in self.parts.values())

    def of_linear(self, page: torch.Tensor, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a page's a [layers, RANK_PAGE, G, K] and b [layers, RANK_PAGE, N]."""
        part, layers = self.parts[linear], self.config.num_layers
        a = page[part.a : part.b].view(layers, RANK_PAGE, len(part.targets.names), part.targets.in_features)
        return a, page[part.b : part.end].view(layers, RANK_PAGE, part.targets.out_features)

    def key(self) -> str:
        """Differs wherever the bytes of an image would mean something else."""
        known = [
            (name, part.targets.names, part.targets.spans, part.targets.in_features, module_paths(self.config, 0, name))
            for name, part in self.parts.items()
        ]
        text = repr((_VERSION, RANK_PAGE, str(self.dtype), self.config.num_layers, known))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class AdapterImage:
    """rank: the largest of any module of the layers. pages: [page_values] each, in rank order; then, if it is
    factored, the page of factors; then bottleneck_pages of weights and vectors, if there are any. scaling: [layers,
    targets of all linears] float32. given: tensors of the adapter; used: those that have a place in this base. soft:
    its soft prompt, ends: its embedding and head, in host memory.
    """

    revision: str
    rank: int
    given: int
    used: int
    pages: tuple[torch.Tensor, ...]
    scaling: torch.Tensor
    soft: SoftPrompt | None = None
    factored: bool = False
    bottleneck_pages: int = 0
    ends: Ends | None = None

    @property
    def rank_pages(self) -> int:
        """How many of its pages hold rank rows."""
        return len(self.pages) - self.factored - self.bottleneck_pages

    @property
    def factor_page(self) -> int | None:
        """Which of its pages holds factors."""
        return self.rank_pages if self.factored else None

    @property
    def only_rank_rows(self) -> bool:
        """Whether pages of rank rows are all that it is."""
        return self.rank_pages == len(self.pages) and self.soft is None and self.ends is None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        beside = sum(part.nbytes for part in (self.soft, self.ends) if part is not None)
        return sum(page.nbytes for page in self.pages) + self.scaling.nbytes + beside


def pages_of_rank(rank: int) -> int:
    """Pages that an adapter of this rank takes."""
    return math.ceil(rank / RANK_PAGE)


@torch.inference_mode()
def lay_out(
    adapter: Adapter,
    layout: ImageLayout,
    take: TakePages,
    base: Base | None = None,
    most_ends: int | None = None,
) -> AdapterImage:
    """The adapter's image, in pages from `take`. base: what it is for; a DoRA's factors depend on its weights, and
    copies of them are compared. most_ends: bytes of an embedding and head at most. InvalidAdapter if a value is not
    finite in the layout's dtype, or the adapter has a part that has no place in an image.
    """
    refuse_bottlenecks(adapter, layout.config, RANK_PAGE)
    ends = ends_of(adapter, base, layout.config, layout.dtype, most_ends)
    factors = factors_of(adapter, base, layout.config)
    rank, beside = rank_of(adapter, layout.config), bottleneck_pages(adapter)
    ranks = pages_of_rank(rank)
    pages = tuple(take(ranks + (factors is not None) + beside))
    for page in pages:
        page.zero_()
    scaling, used = _place_ranks(adapter, layout, pages[:ranks])
    used += ends.used
    if factors is not None:
        used += place_factors(factors, _by_linear(layout, pages[ranks]))
    if beside:
        used += place_bottlenecks(adapter, layout.config, [_by_linear(layout, page) for page in pages[-beside:]])
    if not all(_finite(page) for page in pages):
        raise _too_large(adapter, layout.dtype)
    soft = soft_prompt_of(adapter, layout.dtype)
    if soft is not None:
        used += 1
    given = sum(1 for _ in adapter.tensors())
    return AdapterImage(
        adapter.spec.revision, rank, given, used, pages, scaling, soft, factors is not None, beside, ends.ends
    )


def rank_of(adapter: Adapter, config: ModelConfig) -> int:
    """The largest rank of any module of the layers; the embedding's and the head's take no pages."""
    shape = base_shape(config)
    beside = (shape.embedding, shape.head)
    return max((module.a.shape[0] for path, module in adapter.modules.items() if path not in beside), default=0)


def page_count(adapter: Adapter, config: ModelConfig) -> int:
    """Pages that its image has."""
    return pages_of_rank(rank_of(adapter, config)) + has_factors(adapter, config) + bottleneck_pages(adapter)


def bottleneck_pages(adapter: Adapter) -> int:
    """Pages that its bottlenecks take."""
    return weight_pages(adapter, RANK_PAGE) + 1 if adapter.bottlenecks else 0


def _by_linear(layout: ImageLayout, page: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {linear: layout.of_linear(page, linear) for linear in layout.parts}


def _place_ranks(adapter: Adapter, layout: ImageLayout, pages: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The scaling, and how many tensors of the adapter have found their place in the pages."""
    scaling = torch.zeros(layout.scalings)
    used = column = 0
    for linear, part in layout.parts.items():
        views = [layout.of_linear(page, linear) for page in pages]
        for layer in range(layout.config.num_layers):
            for target, path in enumerate(module_paths(layout.config, layer, linear)):
                module = adapter.modules.get(path)
                if module is None:
                    continue
                span = slice(*part.targets.spans[target])
                for first, (a, b) in zip(range(0, module.a.shape[0], RANK_PAGE), views, strict=False):
                    _place(a[layer, :, target], b[layer, :, span], module, first)
                scaling[layer, column + target] = module.scaling
                used += 2
        column += len(part.targets.names)
    return scaling, used


def _place(a: torch.Tensor, b: torch.Tensor, module: LoraModule, first: int) -> None:
    """Rank rows from `first` on of a module into a page's a [RANK_PAGE, K] and b [RANK_PAGE, outputs]."""
    rows = slice(first, min(first + RANK_PAGE, module.a.shape[0]))
    count = rows.stop - rows.start
    a[:count] = module.a[rows]
    b[:count] = module.b[:, rows].T


def _finite(page: torch.Tensor) -> bool:
    """Whether no exponent is all ones: five times as fast as torch.isfinite on a CPU."""
    as_integer, exponent = _EXPONENT[page.dtype]
    return int((page.view(as_integer) & exponent).max()) != exponent


def _too_large(adapter: Adapter, dtype: torch.dtype) -> InvalidAdapter:
    for path, module in adapter.modules.items():
        if not all(bool(torch.isfinite(half.to(dtype)).all()) for half in (module.a, module.b)):
            return InvalidAdapter(f"{path}: a weight is too large for {dtype}")
    return InvalidAdapter(f"a weight is too large for {dtype}")
