"""Checks constraints before anything is asked of the engine, so that a bad one is a bad request and costs no row."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from adaplex_server.engine.grammar import check_constraint
from adaplex_server.vocabulary import Constraint

_REMEMBERED = 256


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
