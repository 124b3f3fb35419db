"""The one tree of errors, and how each is told to a client.

    AdaplexError                       http  gRPC
    ├── InvalidRequest                 400   INVALID_ARGUMENT
    │   ├── PromptTooLong              400   INVALID_ARGUMENT
    │   ├── RequestTooLarge            413   INVALID_ARGUMENT
    │   └── InvalidAdapter             400   INVALID_ARGUMENT     the files of an adapter are refused
    ├── AuthenticationFailed           401   UNAUTHENTICATED
    ├── PermissionDenied               403   PERMISSION_DENIED
    ├── NotFound                       404   NOT_FOUND
    │   ├── ModelNotFound              404   NOT_FOUND
    │   └── MethodNotAllowed           405   NOT_FOUND            HTTP alone
    ├── Conflict                       409   FAILED_PRECONDITION
    ├── Overloaded                     429   RESOURCE_EXHAUSTED   with a retry hint
    │   └── RateLimited                429   RESOURCE_EXHAUSTED   a key's or an adapter's allowance is used
    ├── Unavailable                    503   UNAVAILABLE          retryable: engine restarting, draining
    ├── DeadlineExceeded               504   DEADLINE_EXCEEDED
    ├── Cancelled                      499   CANCELLED            the client went away
    ├── StorageFailed                  507   INTERNAL             disk full, read-only, permission lost
    ├── RowFailed                      500   INTERNAL             this row's numbers are not finite
    ├── InternalError                  500   INTERNAL             a bug of ours
    └── StartupError                   -     -                    the process ends with `exit_code`

Both skins (HTTP and gRPC) map an error by the class attributes alone; nothing else decides a status. A message says
what was wrong, with which value, and what to do; it never holds a path of the server or a prompt.
"""

from __future__ import annotations

from typing import ClassVar


class AdaplexError(Exception):
    """Base of the tree. `param` names the offending field, `retry_after` is in seconds (None: do not retry)."""

    status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidRequest(AdaplexError):
    """The request cannot be served as written."""

    status, grpc_code, type, code = 400, "INVALID_ARGUMENT", "invalid_request_error", "invalid_value"


class PromptTooLong(InvalidRequest):
    """Prompt and wanted answer do not fit the context."""

    code = "context_length_exceeded"


class RequestTooLarge(InvalidRequest):
    """A body, file or list is over its limit."""

    status, code = 413, "request_too_large"


class InvalidAdapter(InvalidRequest):
    """The files of an adapter are refused; the message names the file, key or tensor.

    problems: everything that is wrong, where the message shows only the first of them.
    """

    code = "invalid_adapter"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        problems: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(message, param=param, retry_after=retry_after)
        self.problems = problems or (message,)


class AuthenticationFailed(AdaplexError):
    """No API key, or one that is not known, revoked or expired."""

    status, grpc_code, type, code = 401, "UNAUTHENTICATED", "invalid_request_error", "invalid_api_key"


class PermissionDenied(AdaplexError):
    """The API key is good, but not for this."""

    status, grpc_code, type, code = 403, "PERMISSION_DENIED", "invalid_request_error", "permission_denied"


class NotFound(AdaplexError):
    """Nothing of that name is here."""

    status, grpc_code, type, code = 404, "NOT_FOUND", "invalid_request_error", "not_found"


class ModelNotFound(NotFound):
    """The request names a model that is neither the base nor an adapter."""

    code = "model_not_found"


class MethodNotAllowed(NotFound):
    """The path of an HTTP request exists, not with this method."""

    status, code = 405, "method_not_allowed"


class Conflict(AdaplexError):
    """The state does not allow it now (a name in use, an upload under way)."""

    status, grpc_code, type, code = 409, "FAILED_PRECONDITION", "invalid_request_error", "conflict"


class Overloaded(AdaplexError):
    """A bounded queue is full; nothing was started."""

    status, grpc_code, type, code = 429, "RESOURCE_EXHAUSTED", "rate_limit_error", "overloaded"


class RateLimited(Overloaded):
    """The allowance of an API key or an adapter is used up; retry_after says when it will not be."""

    code = "rate_limit_exceeded"


class Unavailable(AdaplexError):
    """The engine is starting or was lost, or the server drains. Retrying is safe and sensible."""

    status, grpc_code, type, code = 503, "UNAVAILABLE", "server_error", "unavailable"


class DeadlineExceeded(AdaplexError):
    """The request's time ran out; what was generated so far has been sent."""

    status, grpc_code, type, code = 504, "DEADLINE_EXCEEDED", "server_error", "deadline_exceeded"


class Cancelled(AdaplexError):
    """The client went away."""

    status, grpc_code, type, code = 499, "CANCELLED", "invalid_request_error", "cancelled"


class StorageFailed(AdaplexError):
    """The disk refused (full, read-only, permission); nothing was acknowledged and nothing half-written is kept."""

    status, grpc_code, type, code = 507, "INTERNAL", "server_error", "storage_failed"


class RowFailed(AdaplexError):
    """This row produced NaN or infinity; its neighbours are untouched."""

    code = "row_failed"


class InternalError(AdaplexError):
    """A bug of ours; the log has the trace."""

    code = "internal_error"


class StartupError(AdaplexError):
    """The process cannot start as configured: port taken, base missing, unknown family, too little memory."""

    code = "startup_error"
    exit_code: ClassVar[int] = 2


def all_errors(root: type[AdaplexError] = AdaplexError) -> list[type[AdaplexError]]:
    """Every class of the tree, root first (for tests and for mapping an error by its class name)."""
    return [root, *(e for sub in root.__subclasses__() for e in all_errors(sub))]


def error_named(name: str, message: str, *, retry_after: float | None = None) -> AdaplexError:
    """Rebuild an error from its class name, as it crosses the process boundary; unknown names are InternalError."""
    found = {e.__name__: e for e in all_errors()}.get(name, InternalError)
    return found(message, retry_after=retry_after)
