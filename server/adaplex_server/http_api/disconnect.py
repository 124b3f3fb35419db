"""Runs work for a client and stops it the moment the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from adaplex_adapters.errors import Cancelled

Result = TypeVar("Result")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. If the client leaves first, `work` is cancelled, and Cancelled raised after its cleanup."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("The client went away before the answer was ready.")
    finally:
        await stop(gone)
        await stop(task)


async def until_gone(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def stop(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until its cleanup is over; a finished one is left as it is."""
    if task.done():
        return
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # nobody reads its outcome any more; this tells asyncio so
