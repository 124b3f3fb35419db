"""What is known of one HTTP request besides its body: its id and what the access log will say of it."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass, field

from starlette.types import Scope

from adaplex_server.caller import ANYONE, Caller
from adaplex_server.request_scope import open_scope

_KEY = "adaplex.request"
_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


@dataclass
class RequestContext:
    """Owned by the envelope, which made it; the router fills in who asks (`caller`), and routes may only name the
    `model` and the `outcome` for the log.
    """

    request_id: str
    started: float = field(default_factory=time.monotonic)
    model: str | None = None
    outcome: str | None = None
    caller: Caller = ANYONE


def open_context(scope: Scope) -> RequestContext:
    """Put a new context into the scope, and open the request's scope for logs and traces. A client's own X-Request-Id
    is kept if it is harmless in headers and logs.
    """
    sent = _header(scope, b"x-request-id")
    context = RequestContext(request_id=sent if _SANE_ID.fullmatch(sent) else f"req_{uuid.uuid4().hex}")
    open_scope(context.request_id, _header(scope, b"traceparent"), _header(scope, b"tracestate"))
    scope[_KEY] = context
    return context


def _header(scope: Scope, wanted: bytes) -> str:
    return next((value for name, value in scope["headers"] if name == wanted), b"").decode("latin-1")


def context_of(scope: Scope) -> RequestContext:
    """The context of this request."""
    context = scope[_KEY]
    assert isinstance(context, RequestContext)
    return context
