"""How long a client is willing to wait: the X-Request-Timeout header, as gRPC's calls have their deadline."""

from __future__ import annotations

import re

from starlette.requests import Request

from adaplex_adapters.errors import InvalidRequest

HEADER = "X-Request-Timeout"
DESCRIPTION = (
    "Seconds after which the answer is worthless, such as 2.5, for its whole: the queue and the generation. A request "
    "that would not begin in time is refused with 429 at once; one whose time has run out ends with 504, or with an "
    "error in its stream."
)
_SECONDS = re.compile(r"\d{1,6}(\.\d{1,6})?", re.ASCII)


def time_limit(request: Request) -> float | None:
    """Seconds from now, None if the client sets no limit. Raises InvalidRequest."""
    value = request.headers.get(HEADER)
    if value is None:
        return None
    if not _SECONDS.fullmatch(value) or not float(value):
        raise InvalidRequest(f"{HEADER} is {value[:40]!a}, which is not a number of seconds such as 2.5", param=HEADER)
    return float(value)
