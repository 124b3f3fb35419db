"""`limit` and `after` of lists, as OpenAI's clients page through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from starlette.requests import Request

from adaplex_adapters.errors import InvalidRequest

_MOST = 10_000


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_HasId)


def wanted(request: Request, default: int) -> int:
    """The query's `limit`. Raises InvalidRequest."""
    text = request.query_params.get("limit", str(default))
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        raise InvalidRequest(f"limit is {text[:40]!a}; it must lie in [1, {_MOST}]", param="limit")
    return int(text)


def page(request: Request, items: Sequence[T], default: int = 20) -> tuple[list[T], bool]:
    """The items behind the one that `after` names, at most `limit` of them; and whether there are more."""
    limit, after = wanted(request, default), request.query_params.get("after")
    begin = 0
    if after is not None:
        places = [i for i, item in enumerate(items) if item.id == after]
        if not places:
            raise InvalidRequest(f"after is {after[:60]!a}, which is not in this list", param="after")
        begin = places[0] + 1
    return list(items[begin : begin + limit]), begin + limit < len(items)
