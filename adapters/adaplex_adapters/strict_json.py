"""JSON from strangers: no duplicate keys, no NaN or Infinity, no lone surrogates, no depth that exhausts the stack."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from adaplex_adapters.problems import refuse, shown

MAX_DEPTH = 12


class _Duplicate(ValueError):
    pass


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data` (UTF-8); InvalidAdapter for anything else. `what` names the file in messages."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise refuse(f"{what} is not UTF-8 (byte {error.start}).") from None
    except RecursionError:
        raise refuse(f"{what} is nested too deeply.") from None
    except _Duplicate as error:
        raise refuse(f"{what} has a key twice: {error}.") from None
    except ValueError as error:  # JSONDecodeError, and integers of thousands of digits
        raise refuse(f"{what} is not valid JSON: {shown(str(error))}.") from None
    if not isinstance(value, dict):
        raise refuse(f"{what} must hold a JSON object, not a {type(value).__name__}.")
    _check(value, what)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Duplicate(shown(key))
            seen.add(key)
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check(value: object, what: str) -> None:
    """Depth and text of everything inside, without recursion."""
    waiting: list[tuple[object, int]] = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, str):
            if not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                raise refuse(f"{what} holds half of a character: {shown(item)}.")
            continue
        if isinstance(item, dict):
            inside: list[object] = [*item.keys(), *item.values()]
        elif isinstance(item, list):
            inside = item
        else:
            continue
        if depth > MAX_DEPTH:
            raise refuse(f"{what} is nested more than {MAX_DEPTH} deep.")
        waiting.extend((i, depth + 1) for i in inside)
