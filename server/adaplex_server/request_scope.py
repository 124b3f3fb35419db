"""What a request is called while it is served: its id, and its trace's if it has one. For log lines and for tracing.

A scope is opened where a request comes in and is found by whatever runs for it, tasks that are made for it included.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass

# version-trace id-parent id-flags; https://www.w3.org/TR/trace-context/#traceparent-header
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_SANE_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass
class RequestScope:
    """traceparent: as the client sent it, "" for none or one that is not valid. trace_id: 32 hex digits, from there or
    filled in by the tracer, else "".
    """

    request_id: str
    traceparent: str = ""
    tracestate: str = ""
    trace_id: str = ""


_current: ContextVar[RequestScope | None] = ContextVar("adaplex_request", default=None)


def open_scope(request_id: str, traceparent: str = "", tracestate: str = "") -> RequestScope:
    """The scope of everything that this task and those it makes do from now on. An id that would harm a log line is
    escaped.
    """
    found = _TRACEPARENT.fullmatch(traceparent)
    name = request_id if _SANE_ID.fullmatch(request_id) else ascii(request_id)[:128]
    scope = RequestScope(name, traceparent, tracestate, found[1]) if found else RequestScope(name)
    _current.set(scope)
    return scope


def current_scope() -> RequestScope | None:
    """The scope of this task; None outside of requests."""
    return _current.get()
