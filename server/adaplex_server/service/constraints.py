"""Checks constraints before anything is asked of the engine, so that a bad one is a bad request and costs no row.

What both APIs write in their own words becomes a `Constraint` here.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Sequence

from llguidance.gbnf_to_lark import gbnf_to_lark

from adaplex_server.engine.grammar import check_constraint
from adaplex_server.vocabulary import Constraint

ANY_OBJECT = Constraint("json", '{"type":"object"}')
MAX_CHOICES = 4096
MAX_GBNF_CHARS = 16 << 10
"""Its translator is slow (7 ms for 1,000 characters at worst) and works where all streams wait for it."""
_REMEMBERED = 256


def one_of(texts: Sequence[str]) -> Constraint:
    """The answer is one of these. Raises ValueError with what is wrong about them."""
    if not texts or not all(texts):
        raise ValueError("must be a list of strings that are not empty")
    if len(texts) > MAX_CHOICES:
        raise ValueError(f"holds {len(texts)} strings, at most {MAX_CHOICES} are allowed")
    return Constraint("regex", "|".join(map(re.escape, texts)))


def grammar(text: str) -> Constraint:
    """Lark's language, or GBNF's, which is recognized by its `::=`. Raises ValueError for a GBNF that is none, or that
    is long.
    """
    if "::=" not in text:
        return Constraint("lark", text)
    if len(text) > MAX_GBNF_CHARS:
        raise ValueError(f"has {len(text)} characters of GBNF, at most {MAX_GBNF_CHARS} are taken; write it in Lark")
    try:
        return Constraint("lark", str(gbnf_to_lark(text)))
    except Exception as error:  # a parser of somebody else's, which raises whatever it meets
        raise ValueError(f"is not a GBNF grammar: {error!s:.200}") from None


class ConstraintCheck:
    """Owns which constraints have passed of late, and how many are checked at once."""

    def __init__(self, at_once: int = 2) -> None:
        self._passed: OrderedDict[Constraint, None] = OrderedDict()
        self._turn = asyncio.Semaphore(at_once)

    async def __call__(self, constraint: Constraint) -> None:
        """Raises InvalidRequest if no grammar can be made of it."""
        if constraint in self._passed:
            self._passed.move_to_end(constraint)
            return
        async with self._turn:
            await asyncio.to_thread(check_constraint, constraint)
        self._passed[constraint] = None
        if len(self._passed) > _REMEMBERED:
            self._passed.popitem(last=False)
