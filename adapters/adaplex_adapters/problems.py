"""Problems found in the files of an adapter, gathered so that a user sees all of one stage at once.

Reading goes in stages (files, config, header, tensors, fit to the base); a stage reports everything that it finds, and
the next one runs only when it found nothing.
"""

from __future__ import annotations

from adaplex_adapters.errors import InvalidAdapter

_SHOWN = 5
_MAX_TEXT = 120


class AdapterProblems(InvalidAdapter):
    """InvalidAdapter with every problem of its stage in `problems`; the message shows the first few."""

    def __init__(self, problems: list[str]) -> None:
        more = len(problems) - _SHOWN
        text = " ".join(problems[:_SHOWN]) + (f" And {more} more of this kind." if more > 0 else "")
        super().__init__(text)
        self.problems = tuple(problems)


def refuse(problem: str) -> AdapterProblems:
    """The error for a single problem, to be raised by the caller."""
    return AdapterProblems([problem])


def raise_if_any(problems: list[str]) -> None:
    """Raise AdapterProblems when the list is not empty."""
    if problems:
        raise AdapterProblems(problems)


def shown(value: object) -> str:
    """A hostile value made safe for a message: ASCII, escaped, at most 120 characters."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = ascii(value[: 2 * _MAX_TEXT] if isinstance(value, str) else value)
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
