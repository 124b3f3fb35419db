"""The names of several adapters used at once: "style+task", "style*0.7+task*0.3".

Neither character may stand in an adapter's own name, so a name is either one adapter's or a composition's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.names import check_name

MAX_PARTS = 8
"""A client may name as many adapters as it likes; reading that many is work."""
_WEIGHT = re.compile(r"-?(\d{1,9}(\.\d{0,20})?|\.\d{1,20})", re.ASCII)


@dataclass(frozen=True)
class NamedPart:
    """One adapter of a composition, by name, and what its low-rank additions are multiplied with."""

    name: str
    weight: float = 1.0


def is_composed(model: str) -> bool:
    """Whether this can only be the name of a composition."""
    return "+" in model or "*" in model


def parse_composed(model: str) -> tuple[NamedPart, ...]:
    """The parts in their order. Raises InvalidRequest with the part that is wrong."""
    pieces = model.split("+")
    check_count(len(pieces))
    return tuple(_part(piece.strip(), model) for piece in pieces)


def check_count(parts: int) -> None:
    """Raises InvalidRequest for none or too many."""
    if not 1 <= parts <= MAX_PARTS:
        raise InvalidRequest(f"a composition has 1 to {MAX_PARTS} adapters, not {parts}", param="model")


def _part(piece: str, model: str) -> NamedPart:
    name, star, weight = (text.strip() for text in piece.partition("*"))
    try:
        check_name(name)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"{model[:200]!a} is not a composition of adapters like 'a+b' or 'a*0.7+b*0.3': {error.message}",
            param="model",
        ) from None
    if star and not _WEIGHT.fullmatch(weight):
        raise InvalidRequest(
            f"the weight {weight[:40]!a} of '{name}' is not a decimal number like 0.7 or -1", param="model"
        )
    return NamedPart(name, float(weight) if star else 1.0)
