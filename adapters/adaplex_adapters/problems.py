"""Problems found in the files of an adapter, gathered so that a user sees all of one stage at once.

Reading goes in stages: files, config and tensors by themselves; what they say together; the fit to the base. A stage
reports everything that it finds, and the next one runs only when it found nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from adaplex_adapters.errors import InvalidAdapter

P = ParamSpec("P")
T = TypeVar("T")

_SHOWN = 5
_MAX_TEXT = 120


def refusal(problems: list[str]) -> InvalidAdapter:
    """The error for all problems of a stage; the message shows the first few."""
    more = len(problems) - _SHOWN
    text = " ".join(problems[:_SHOWN]) + (f" And {more} more of this kind." if more > 0 else "")
    return InvalidAdapter(text, problems=tuple(problems))


def refuse(problem: str) -> InvalidAdapter:
    """The error for a single problem, to be raised by the caller."""
    return refusal([problem])


def raise_if_any(problems: list[str]) -> None:
    """Raise InvalidAdapter when the list is not empty."""
    if problems:
        raise refusal(problems)


def shown(value: object) -> str:
    """A hostile value made safe for a message: ASCII, escaped, at most 120 characters."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = ascii(value[: 2 * _MAX_TEXT] if isinstance(value, str) else value)
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."


class Gathered:
    """Problems of steps that do not need one another's results, to be told together."""

    def __init__(self) -> None:
        self._problems: list[str] = []

    def step(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What the function returns; None, with its problems kept, when it refuses."""
        try:
            return function(*args, **kwargs)
        except InvalidAdapter as error:
            self._problems.extend(error.problems)
            return None

    def add(self, problems: Iterable[str]) -> None:
        """Keep these too."""
        self._problems.extend(problems)

    def __bool__(self) -> bool:
        return bool(self._problems)

    def raise_if_any(self) -> None:
        """Raise InvalidAdapter when a step refused."""
        raise_if_any(self._problems)
